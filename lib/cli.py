"""What the command lines share: flags, their types, checks that need no model, and exit statuses. Imports no torch."""

import argparse
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from lib import ledger, state
from lib.errors import InputError, describe_failure
from lib.files import RESULT, check_model_folder, check_writable
from lib.methods import GRADIENT_LOSSES, GRADIENT_TYPES, Pattern, parse_pattern
from lib.names import ModelSource, expand, is_hub_model, locate_model, short_name

DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("auto", "none", "cpu", "disk")
NOT_ASKED = ("output_dir", "overwrite", "resume", "offload", "batch_size", "device", "device_map")  # change no result


class Parser(argparse.ArgumentParser):
    """An argument parser of whole flag names, whose errors are one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


# Types ----------------------------------------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    """True/False in any case, also 1/0 and yes/no."""
    word = text.strip().lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if number < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
    return number


def between_0_and_1(text: str) -> float:
    """A number between 0 and 1, neither included."""
    return _number(text, "a number between 0 and 1", lambda number: 0 < number < 1)


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, "a number of at least 0 and below 1", lambda number: 0 <= number < 1)


def at_most_1(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def above_0(text: str) -> float:
    """A number above 0."""
    return _number(text, "a number above 0", lambda number: 0 < number < float("inf"))


def up_to_10(text: str) -> float:
    """A number above 0, up to 10."""
    return _number(text, "a number above 0, up to 10", lambda number: 0 < number <= 10)


def _number(text: str, what: str, is_fine: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not is_fine(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def pattern(text: str) -> Pattern:
    """`unstructured` or `n:m`."""
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def group_size(text: str) -> int | None:
    """A whole number above 0, or -1 for none."""
    return None if text.strip() == "-1" else positive(text)


def ratio(text: str) -> float | str:
    """A number from 0.01 to 100, or `auto`."""
    try:
        number = text if text == "auto" else float(text)
    except ValueError:
        number = 0.0
    if number != "auto" and not 0.01 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0.01 to 100 nor auto")
    return number


def name(text: str) -> str:
    """The name of a model or text: anything but nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    return text


def folder(text: str) -> Path:
    """A path, `~` expanded."""
    path = expand(name(text))
    if text.startswith("~") and str(path).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no home folder is known of that user")
    return path


# Flags ----------------------------------------------------------------------------------------------------------------


def add_device_flags(group) -> None:
    """How a model is loaded, and where it runs."""
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="default: auto, that of the checkpoint")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    group.add_argument("--device_map", help="spread the model over devices, as in transformers: auto, balanced, ...")
    group.add_argument(
        "--offload",
        choices=OFFLOADS,
        default="auto",
        help="where layers wait that are not worked on: on the device, in host memory, on disk (default: what fits)",
    )
    group.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the pruning scripts have in common: how to run, and where to write."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--seed", type=count, nargs="+", default=[0], help="one or several, of the calibration text (default: 0)"
    )
    group.add_argument(
        "--seqlen", type=positive, help="tokens in a window (default: the model's context, at most 2048)"
    )
    group.add_argument(
        "--batch_size", type=positive, help="windows at once (default: large, halved when memory runs out)"
    )
    group.add_argument(
        "--eval_stride", type=positive, help="evaluation windows begin so many tokens apart (default: a window)"
    )
    add_device_flags(group)
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=folder, help="folder for results, log.txt and plots (default: runs/...)")
    group.add_argument("--overwrite", action="store_true", help="replace the results or the model in these folders")
    group.add_argument("--resume", action="store_true", help="go on with a run that was stopped, in its --output_dir")


def add_gradient_flags(group, ngrad: str) -> None:
    """How ALP's gradients are taken; `ngrad` is what the number of their windows is called."""
    group.add_argument(ngrad, type=positive, default=10, help="windows of text for the gradients (default: 10)")
    group.add_argument("--grad_seqlen", type=positive, default=64, help="tokens in such a window (default: 64)")
    group.add_argument(
        "--grad_loss", choices=GRADIENT_LOSSES, default="last", help="the loss of the last token, or of all"
    )
    group.add_argument(
        "--grad_type", choices=GRADIENT_TYPES, default="l2", help="how gradients are summed (default: l2)"
    )


def model_source(args: argparse.Namespace, name: str) -> ModelSource:
    """The model of that name, loaded as the device flags say."""
    cache_dir = getattr(args, "cache_dir", None)
    return ModelSource(name, args.dtype, args.device, args.device_map, args.trust_remote_code, cache_dir, args.offload)


def check_device(args: argparse.Namespace) -> None:
    """Raises `InputError` for a device map beside other ways to place a model."""
    if args.device_map and args.device != "auto":
        raise InputError(f"--device {args.device} and --device_map {args.device_map}: give one of them")
    if args.device_map and args.offload != "auto":
        raise InputError(f"--offload {args.offload} and --device_map {args.device_map}: give one of them")
    are_several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # processes, which a launcher started
    if args.device_map and are_several:
        raise InputError("--device_map: several processes have a device each; leave it out")
    if ":" in args.device and are_several:
        raise InputError(f"--device {args.device}: several processes have a device each; give its kind only")


def default_output_dir(tool: str, model: str) -> Path:
    """`runs/<tool>-<model>-<time>`, with a number behind it should that exist."""
    base = Path("runs") / f"{tool}-{short_name(model)[:80]}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(name for name in names if not name.exists())


def set_preset(parser: Parser, presets: dict[str, dict], arguments: list[str] | None) -> None:
    """Adds the flag `--preset` to a parser that has all others, and lets what it names be their defaults."""
    parser.add_argument("--preset", choices=presets, help="the settings of a whole table; other flags change them")
    ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    ahead.add_argument("--preset")
    with suppress(argparse.ArgumentError):  # which the parser itself will tell
        name = ahead.parse_known_args(arguments)[0].preset
        parser.set_defaults(**presets.get(name, {}))


def is_grid(args: argparse.Namespace, axes: Sequence[str]) -> bool:
    """True when the arguments ask for several runs, or for a table of them."""
    return args.preset is not None or any(len(getattr(args, axis) or ()) > 1 for axis in axes)


def grid_output_dir(tool: str, args: argparse.Namespace) -> Path:
    """`runs/<tool>-<preset>-<digest>`: the same for the same arguments, so that the same command goes on."""
    asked = {name: str(value) for name, value in vars(args).items() if name not in NOT_ASKED}
    digest = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:8]
    return Path("runs") / f"{tool}-{args.preset or 'grid'}-{digest}"


def parse_and_tell(parser: Parser, arguments: list[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and which of them were given rather than left at their defaults."""
    args = parser.parse_args(arguments)
    untouched = object()
    again = parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(vars(args), untouched)))
    return args, {name for name, value in vars(again).items() if value is not untouched}


# Checks ---------------------------------------------------------------------------------------------------------------


def check_output(args: argparse.Namespace, model: str) -> None:
    """Raises `InputError` unless what a run on `model` will write can be written, without harm to what is there."""
    if not is_first_process():
        return  # the first one writes, and may have begun
    output_dir = args.output_dir
    check_writable(output_dir or Path("runs"), "--output_dir")
    if args.resume and not output_dir:
        raise InputError("--resume: needs --output_dir, the folder of the run that is to go on")
    if output_dir and not args.overwrite and not args.resume:
        if (output_dir / RESULT).exists():
            raise InputError(f"--output_dir {output_dir}: holds a result; name another folder or add --overwrite")
        if state.is_unfinished(output_dir / state.FOLDER):
            advice = "add --resume to go on with it, or --overwrite to begin anew"
            raise InputError(f"--output_dir {output_dir}: holds unfinished work; {advice}")
    if output_dir and (output_dir / ledger.FILE).exists():
        raise InputError(f"--output_dir {output_dir}: holds a grid of results; name another folder")
    if not args.save_model:
        return
    is_own = args.resume and state.was_saving(output_dir / state.FOLDER, args.save_model)
    is_finished = args.resume and (output_dir / RESULT).exists()  # then nothing is written, or it is refused later
    if not is_own and not is_finished:
        check_model_folder(args.save_model, args.overwrite, "--save_model")
    target, output = args.save_model.resolve(), (output_dir or Path("runs")).resolve()
    if target == output or target in output.parents:
        raise InputError(f"--save_model {args.save_model}: --output_dir lies in it; name another folder")
    if not is_hub_model(model) and target == Path(locate_model(model)).resolve():
        raise InputError(f"--save_model {args.save_model}: is the model that is pruned; name another folder")


def is_first_process() -> bool:
    """True for the process that writes, where a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def check_apart(output_dir: Path, texts: Iterable[str]) -> None:
    """Raises `InputError` for an output folder within a folder of text, which the next run would read as text."""
    for text in texts:
        folder = expand(text)
        if folder.is_dir() and folder.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
            raise InputError(f"--output_dir {output_dir}: lies in the folder of text {text}; name another")


def check_grid_output(args: argparse.Namespace) -> None:
    """Raises `InputError` unless the folder of a grid can be written, and holds no other kind of result."""
    check_writable(args.output_dir, "--output_dir")
    if (args.output_dir / RESULT).exists():
        raise InputError(f"--output_dir {args.output_dir}: holds the result of a single run; name another folder")
    if args.save_model:
        raise InputError("--save_model: saves one model; leave it out, or give one value for each flag")


def prefer_cache_without_network() -> None:
    """Makes the hub libraries, imported later, use their cache at once when the hub is out of reach."""
    if "HF_HUB_OFFLINE" in os.environ or any(name.lower() == "https_proxy" for name in os.environ):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


# Running --------------------------------------------------------------------------------------------------------------


def run(program: str, main: Callable[[], None]) -> int:
    """Runs a script's main function; its exit status: 0 done, 1 a failure, 2 a bad input, each with one line."""
    try:
        main()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = describe_failure(error)
        if message is None:
            raise
        is_input = isinstance(error, InputError)
    if not is_first_process():
        message = f"process {os.environ['RANK']}: {message}"
    print(f"{program}: {'error' if is_input else 'failed'}: {message}", file=sys.stderr)
    return 2 if is_input else 1
