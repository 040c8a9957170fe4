"""Heal a pruned model: train low-rank adapters towards the dense model for a while, and merge them into its weights.

    python ppllms.py --compensate all --save_model OUT
    python -m lib.heal --model OUT --save_model HEALED

The model is a folder that ppllms.py or alp_prune.py saved with --save_format hf. Where a quarter
of the weights or more are zero, these stay zero.
"""

import lib.cli.starting  # noqa: F401  (before all else: Ctrl-C is one line from here on)

# isort: split
import argparse
import sys
from pathlib import Path

from lib.cli import checks, flags, types
from lib.cli.exit_status import end_script, importing
from lib.config import sources
from lib.config.healing import Healing
from lib.config.mixture import check_evaluation_text, parse_mixture
from lib.config.plan import SavedPlan, plan_beside
from lib.config.tasks import expand_sets
from lib.errors import InputError
from lib.runtime.launcher import launched
from lib.storage.model_folder import is_gguf_target

SAVE_FORMATS = ("hf", "nemotron-nas")
NO_TEACHER = "none"


def build_parser() -> flags.Parser:
    """The parser of all flags."""
    parser = flags.Parser(description=__doc__, prog="heal")
    group = parser.add_argument_group("models and text")
    group.add_argument("--model", type=types.name, required=True, help="the pruned model: folder or hub id")
    group.add_argument(
        "--teacher",
        type=types.name,
        help=f"the dense model, or {NO_TEACHER}: train on the text itself (default: that of the model's plan, or none)",
    )
    group.add_argument("--cache_dir", type=types.folder, help="folder for the hub's files (default: the hub's own)")
    group.add_argument(
        "--dataset",
        "--calibration_dataset",
        type=types.name,
        nargs="+",
        help=f"text to train on: {flags.CALIBRATION_TEXTS} (default: c4; demo for the demo model)",
    )
    group.add_argument("--nsamples", type=types.positive, default=5000, help="its documents (default: 5000)")
    group.add_argument(
        "--eval_datasets", type=types.name, nargs="+", help="evaluation texts (default: wikitext2; demo for the demo)"
    )
    flags.add_tasks(group, "none")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=types.positive, default=300, help="steps at most (default: 300)")
    group.add_argument("--train_batch_size", type=types.positive, default=8, help="windows of each step (default: 8)")
    group.add_argument("--rank", type=types.positive, default=32, help="rank of the adapters (default: 32)")
    group.add_argument(
        "--learning_rate", type=types.above_0, default=2e-3, help="the highest, after the first steps (default: 0.002)"
    )
    group.add_argument("--seed", type=types.count, default=0, help="seed of the text and of the adapters (default: 0)")
    flags.add_run_flags(parser, parser.add_argument_group("running"), has_offload=False)
    group = parser.add_argument_group("saving")
    group.add_argument("--save_model", type=types.folder, help="folder for the healed model")
    group.add_argument("--save_format", **flags.one_of(SAVE_FORMATS), default="hf", help="default: hf")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked as far as they alone allow. Raises `InputError`."""
    args = build_parser().parse_args(arguments)
    if is_gguf_target(args.save_model):
        advice = "save a folder, and give that to ppllms.py --apply_plan with --gguf IN OUT"
        raise InputError(f"--save_model {args.save_model}: is a GGUF file; {advice}")
    args.tasks = expand_sets(args.tasks or ())
    saved = plan_beside(args.model)
    args.teacher = find_teacher(args.teacher, saved)
    names = (args.model, args.teacher or args.model, saved.model if saved else args.model)
    is_of_demo = any(map(sources.is_demo, names))
    args.dataset = parse_mixture("--dataset", args.dataset or ["demo" if is_of_demo else "c4"])
    args.eval_datasets = list(dict.fromkeys(args.eval_datasets or ["demo" if is_of_demo else "wikitext2"]))
    return args


def find_teacher(given: str | None, saved: SavedPlan | None) -> str | None:
    """The dense model: as given, or the one that the plan in the pruned folder was found for. None without one."""
    if given:
        return None if given.lower() == NO_TEACHER else given
    if not saved:
        return None
    found = saved.model
    if not sources.is_hub_model(found) and not sources.is_demo(found) and not sources.expand(found).exists():
        what = f"{saved.path} names {found}, which is not there"
        raise InputError(f"--teacher: {what}; give the dense model, or {NO_TEACHER}")
    return found


def check(args: argparse.Namespace) -> None:
    """Checks everything that needs no torch. Raises `InputError`."""
    if launched().are_several:
        raise InputError("healing runs in one process; start it without torchrun")
    models = [args.model, *([args.teacher] if args.teacher else [])]
    for name in models:
        sources.check_model(name)
    if args.dataset.is_sampled and not args.teacher:
        raise InputError("--dataset self: is text of the dense model; give --teacher, or name a text")
    args.dataset.counts(args.nsamples)
    for text in args.eval_datasets:
        check_evaluation_text("--eval_datasets", text)
    texts = [*args.dataset.read, *args.eval_datasets]
    for text in texts:
        sources.check_text(text)
    if args.tasks:
        checks.check_lm_eval("--tasks")
    checks.check_device(args)
    checks.check_apart({"--output_dir": args.output_dir or Path("runs"), "--save_model": args.save_model}, texts)
    checks.check_output(args, [*models, *texts, *args.tasks, *checks.check_prompts(args)])
    if any(map(sources.is_hub_model, models)) or any(map(sources.is_hub_text, texts)) or args.tasks:
        checks.prefer_cache_without_network()


def main() -> None:
    args = parse()
    check(args)
    with importing():
        from lib.heal.run import HealRun  # imports torch
        from lib.runs.single import run_single

    shared = {name: value for name, value in vars(args).items() if name in Healing.__dataclass_fields__}
    run_single(HealRun, Healing(flags.model_source(args, args.model), **shared))


def command() -> None:
    """Entry point of the command."""
    sys.argv[0] = "heal"  # as results and cards quote it
    end_script("heal", main)


if __name__ == "__main__":
    command()
