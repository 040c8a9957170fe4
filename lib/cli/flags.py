"""The flags that the scripts share, and the parser that they are added to. Imports no torch."""

import argparse
import os
import sys
import textwrap
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from lib import version
from lib.cli.types import choice, count, folder, name, positive
from lib.config.gradients import GRADIENT_LOSSES, GRADIENT_TYPES
from lib.config.methods import Entry
from lib.config.sources import PACKINGS, TEXT_KINDS, ModelSource
from lib.config.tasks import TASK_SETS
from lib.errors import describe_failure, nearest, one_line

DTYPES = ("auto", "float32", "bfloat16", "float16")
_OTHER_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
OFFLOADS = ("auto", "none", "cpu", "disk")
TEXTS = (
    f"c4, wikitext2, demo, a hub id, or a file or folder: {' '.join(TEXT_KINDS)}, packed as {' '.join(PACKINGS)}, or "
    "one of save_to_disk; `:CONFIG` and `::COLUMN` may follow"
)
CALIBRATION_TEXTS = f"{TEXTS}; or self, sampled from the model; several are mixed, in shares as c4:0.7 wikitext2:0.3"


class Parser(argparse.ArgumentParser):
    """An argument parser that takes whole flag names only, and whose errors are one line."""

    def __init__(self, **options):
        super().__init__(
            usage="%(prog)s [--FLAG VALUE ...]",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument("--version", action=_Version, nargs=0, help="print the version of these scripts, and exit")

    def parse_args(self, args=None, namespace=None):
        """The arguments; an unknown flag ends the script with the nearest one that there is."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            meant = nearest(word, self._option_string_actions) if word.startswith("-") else None
            advice = f"did you mean {meant}?" if meant else "--help lists all flags"
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {advice}")
        try:
            os.getcwd().encode()  # which results hold
        except UnicodeEncodeError as error:
            self.error(str(describe_failure(error)))
        return found

    def parse_known_args(self, args=None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("-") and word.endswith("=--"):  # which argparse takes for a flag with no value
                self.error(f"argument {word[:-3]}: expected a value, not --")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _Version(argparse.Action):
    """Prints the version, found only when it is asked for."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **options)

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{parser.prog} {version.describe()}")
        parser.exit()


def one_of(options: Collection[str], synonyms: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options of a flag that takes one of some words, or a synonym of one."""
    return {"type": choice(options, synonyms), "choices": options}


def add_device_flags(group, has_offload: bool = True) -> None:
    """Adds the flags for how a model is loaded and where it runs."""
    group.add_argument(
        "--dtype",
        **one_of(DTYPES, _OTHER_NAMES),
        default="auto",
        help="default: auto, that of the checkpoint",
    )
    group.add_argument("--device", type=name, default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument(
        "--device_map", type=name, help="spread the model over devices, as in transformers: auto, balanced, ..."
    )
    if has_offload:
        group.add_argument(
            "--offload",
            **one_of(OFFLOADS),
            default="auto",
            help="where layers are kept between uses: none (on the device), cpu or disk (default: what fits)",
        )
    group.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that both pruning scripts have: how to run, and where to write."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--seed", type=count, nargs="+", default=[0], help="seed of the calibration set, or several (default: 0)"
    )
    add_run_flags(parser, group)


def add_run_flags(parser: argparse.ArgumentParser, group, has_offload: bool = True) -> None:
    """Adds the flags of every run that is measured on text, but for its seed."""
    group.add_argument(
        "--seqlen", type=positive, help="tokens in a window (default: the model's context, at most 2048)"
    )
    group.add_argument(
        "--batch_size", type=positive, help="windows in a batch (default: automatic, halved when memory runs out)"
    )
    group.add_argument(
        "--eval_stride", type=positive, help="tokens between the starts of evaluation windows (default: a window)"
    )
    group.add_argument(
        "--eval_windows", type=positive, help="evaluation windows of each text, evenly spread (default: all)"
    )
    group.add_argument(
        "--prompts", type=folder, help="file of prompts to continue, one a line (default: evaluation text, questions)"
    )
    add_device_flags(group, has_offload)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=folder, help="folder for results, log.txt and plots (default: runs/...)")
    group.add_argument("--overwrite", action="store_true", help="replace the results or the model in these folders")
    group.add_argument("--resume", action="store_true", help="continue the stopped run in --output_dir")
    group.add_argument("--dry_run", action="store_true", help="check everything, tell time, memory and disk, and end")


def add_tasks(group, default: str) -> None:
    """Adds the flag `--tasks`; `default` says what is measured without it."""
    sets = ", ".join(f"{name} ({' '.join(tasks)})" for name, tasks in TASK_SETS.items())
    group.add_argument(
        "--tasks", type=name, nargs="+", help=f"of lm_eval: names, YAML files, or {sets} (default: {default})"
    )


def add_gradient_flags(group, ngrad: str) -> None:
    """Adds the flags for how ALP's gradients are computed; `ngrad` is the flag for the number of windows."""
    group.add_argument(ngrad, type=positive, default=10, help="windows of text for the gradients (default: 10)")
    group.add_argument("--grad_seqlen", type=positive, default=64, help="tokens in such a window (default: 64)")
    group.add_argument(
        "--grad_loss",
        **one_of(GRADIENT_LOSSES),
        default="last",
        help="the loss of the last token, or of all (default: last)",
    )
    group.add_argument(
        "--grad_type",
        **one_of(GRADIENT_TYPES),
        default="l2",
        help="how gradients are summed (default: l2)",
    )


def model_source(args: argparse.Namespace, name: str) -> ModelSource:
    """The source of a model, loaded as the device flags say."""
    cache_dir = getattr(args, "cache_dir", None)
    offload = getattr(args, "offload", "none")
    return ModelSource(name, args.dtype, args.device, args.device_map, args.trust_remote_code, cache_dir, offload)


def list_methods(title: str, methods: Mapping[str, Entry]) -> str:
    """The methods of a registry with their lines of help and their papers, for the end of `--help`."""
    width = max(map(len, methods))
    indent = " " * (width + 4)
    lines = [
        textwrap.fill(f"  {method.name:<{width}}  {method.help} ({method.paper})", 100, subsequent_indent=indent)
        for method in methods.values()
    ]
    return "\n".join([title, *lines]) + "\n"


def add_preset(parser: Parser, presets: Mapping[str, dict]) -> None:
    """Adds the flag `--preset`."""
    parser.add_argument(
        "--preset",
        **one_of(presets),
        help="the settings of a whole table; other flags change them",
    )


def parse_with_preset(
    parser: Parser, presets: Mapping[str, dict], arguments: list[str] | None
) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and the names of those that were given; a preset sets the defaults of the others."""
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--preset", type=choice(presets))
    with suppress(argparse.ArgumentError, TypeError):  # which the parser itself reports
        name = ahead.parse_known_args(arguments)[0].preset
        parser.set_defaults(**presets.get(name, {}))
    args = parser.parse_args(arguments)
    untouched = object()
    again = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(args), untouched)))
    return args, {name for name, value in vars(again).items() if value is not untouched}
