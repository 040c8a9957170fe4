#!/usr/bin/env python3
"""ALP, first step: computes the connection sensitivity of every layer from gradients on a few short windows of text.

Writes a small JSON file, which alp_prune.py finds by the model and these settings.

    python save_gradient.py                                              # bundled demo model and text
    python save_gradient.py --model Enoch/llama-7b-hf --ngrad 10
    python save_gradient.py --model PATH --dataset PATH --grad_type l2_hundred_total
"""

import lib.cli.starting  # noqa: F401  (before all else: Ctrl-C is one line from here on)

# isort: split
import argparse

from lib.cli import checks, flags, types
from lib.cli.exit_status import end_script, importing
from lib.config import sources
from lib.config.gradients import GradientSettings, is_ours
from lib.config.mixture import parse_mixture
from lib.errors import InputError
from lib.runtime.launcher import launched
from lib.storage import resume_state
from lib.storage.atomic import check_writable
from lib.storage.output_folder import check_plot
from lib.storage.state_folder import check_state_folder


def build_parser() -> flags.Parser:
    """The parser of all flags."""
    parser = flags.Parser(description=__doc__)
    group = parser.add_argument_group("model and text")
    group.add_argument(
        "--model",
        type=types.name,
        default="demo",
        help="hub id, local folder or GGUF file (default: the bundled demo model)",
    )
    group.add_argument("--cache_dir", type=types.folder, help="folder for the hub's files (default: the hub's own)")
    group.add_argument(
        "--dataset",
        "--calibration_dataset",
        type=types.name,
        nargs="+",
        help=f"{flags.CALIBRATION_TEXTS} (default: c4; demo for the demo model)",
    )
    group.add_argument("--seed", "--grad_seed", type=types.count, default=0, help="seed of the windows (default: 0)")
    flags.add_gradient_flags(parser.add_argument_group("gradients"), "--ngrad")
    flags.add_device_flags(parser.add_argument_group("running"))
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=types.folder, help="file to write (default: gradients/MODEL-SETTINGS.json)")
    group.add_argument("--overwrite", action="store_true", help="replace that file")
    group.add_argument("--resume", action="store_true", help="continue a stopped run")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with the settings of the gradients and the file to write."""
    args = build_parser().parse_args(arguments)
    default = "demo" if sources.is_demo(args.model) else "c4"
    dataset = parse_mixture("--dataset", args.dataset or [default])
    args.gradients = GradientSettings(dataset, args.ngrad, args.grad_seqlen, args.grad_loss, args.grad_type, args.seed)
    args.output = args.output or args.gradients.path(args.model, args.dtype)
    return args


def check(args: argparse.Namespace) -> None:
    """Checks everything that needs no torch. Raises `InputError`."""
    sources.check_model(args.model)
    texts = args.gradients.dataset.read
    args.gradients.dataset.counts(args.ngrad)
    for text in texts:
        sources.check_text(text)
    checks.check_device(args)
    checks.check_apart({"--output": args.output}, texts)
    if launched().is_first:
        check_output(args)
    if sources.is_hub_model(args.model) or any(map(sources.is_hub_text, texts)):
        checks.prefer_cache_without_network()


def check_output(args: argparse.Namespace) -> None:
    """Raises `InputError` unless the file can be written and nothing else is overwritten."""
    if args.output.suffix != ".json":
        raise InputError(f"--output {args.output}: name a file that ends in .json")
    plot = args.output.with_suffix(".png")  # stands beside it
    for path in (args.output, plot):
        if path.is_dir():
            raise InputError(f"--output {path}: is a folder; name a file in it")
        if path.exists() and not args.overwrite and not args.resume:
            raise InputError(f"--output {path}: exists; name another file or add --overwrite")
    if args.output.exists() and not is_ours(args.output):
        raise InputError(f"--output {args.output}: is no file of gradients, and is not replaced; name another")
    check_plot(plot, f"--output {args.output}")
    state = args.output.with_suffix(".state")
    check_state_folder(state, f"--output {args.output}")
    if not (args.overwrite or args.resume) and resume_state.is_unfinished(state):
        raise InputError(f"--output {args.output}: is unfinished; add --resume to go on, or --overwrite to begin anew")
    check_writable(args.output.parent, "--output")


def main() -> None:
    args = parse()
    check(args)
    with importing():
        from lib.sensitivity.run import SaveGradient, run  # imports torch

    run(SaveGradient(flags.model_source(args, args.model), args.gradients, args.output, args.overwrite, args.resume))


def command() -> None:
    """Entry point of the script and of the installed console script."""
    end_script("save_gradient.py", main)


if __name__ == "__main__":
    command()
