"""Checks of a command line that need no model, and the output folders that it names. Imports no torch."""

import argparse
import atexit
import hashlib
import importlib.util
import os
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lib.config.keys import WITHOUT_EFFECT
from lib.config.prompts import read_prompts
from lib.config.sources import locate_model, parse_text
from lib.errors import InputError
from lib.runtime.launcher import launched
from lib.storage import resume_state
from lib.storage.atomic import check_writable
from lib.storage.model_folder import check_holds_none_of, check_model_target
from lib.storage.output_folder import RESULT, STATE, check_output_folder, is_of_ours
from lib.storage.state_folder import check_state_folder


def check_device(args: argparse.Namespace) -> None:
    """Raises `InputError` for a device map together with another way to place a model."""
    if args.device_map and args.device != "auto":
        raise InputError(f"--device {args.device} and --device_map {args.device_map}: give one of them")
    if args.device_map and getattr(args, "offload", "auto") != "auto":
        raise InputError(f"--offload {args.offload} and --device_map {args.device_map}: give one of them")
    are_several = launched().are_several
    if args.device_map and are_several:
        raise InputError("--device_map: several processes have a device each; leave it out")
    if ":" in args.device and are_several:
        raise InputError(f"--device {args.device}: several processes have a device each; give its kind only")


def check_lm_eval(flag: str) -> None:
    """Raises `InputError` when lm_eval, which a flag needs, is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"{flag}: lm_eval is not installed; pip install lm-eval")


def is_grid(args: argparse.Namespace, axes: Sequence[str]) -> bool:
    """True when the arguments ask for several runs or a table."""
    return args.preset is not None or any(len(getattr(args, axis) or ()) > 1 for axis in axes)


def grid_output_dir(tool: str, args: argparse.Namespace) -> Path:
    """`runs/<tool>-<preset>-<digest>`: the same for the same arguments, so that the same command resumes."""
    asked = {name: str(value) for name, value in vars(args).items() if name not in WITHOUT_EFFECT[tool]}
    digest = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:8]
    return Path("runs") / f"{tool}-{args.preset or 'grid'}-{digest}"


def check_output(args: argparse.Namespace, used: Iterable[str | Path]) -> None:
    """Raises `InputError` unless a run can write its files and replaces nothing else.

    `used` names the models and texts that the run reads, and the paths of other files.
    """
    if not launched().is_first:
        return  # only the first process writes, and it may have begun
    output_dir = args.output_dir
    if args.prompts and output_dir and is_of_ours(args.prompts, output_dir):
        raise InputError(f"--prompts {args.prompts}: is one of the output folder's own files; name a copy")
    if args.resume and not output_dir:
        raise InputError("--resume: needs --output_dir, the folder of the run that is to go on")
    if not output_dir:
        check_writable(Path("runs"), "--output_dir")
    else:
        check_output_folder(output_dir, "run")
        state = output_dir / STATE
        check_state_folder(state, f"--output_dir {output_dir}")
        if not args.overwrite and not args.resume:
            if resume_state.is_unfinished(state):
                advice = "add --resume to go on with it, or --overwrite to begin anew"
                raise InputError(f"--output_dir {output_dir}: holds unfinished work; {advice}")
            if (output_dir / RESULT).exists():
                raise InputError(f"--output_dir {output_dir}: holds a result; name another folder or add --overwrite")
    if args.save_model:
        check_save_model(args, used)


def check_save_model(args: argparse.Namespace, used: Iterable[str | Path]) -> None:
    """Raises `InputError` unless the model can be saved, and nothing that the run uses lies in that folder."""
    folder, output_dir = args.save_model, args.output_dir or Path("runs")
    named = [Path(locate_model(parse_text(name).source)) for name in used if isinstance(name, str)]
    paths = [name for name in used if isinstance(name, Path)]
    check_holds_none_of(folder, [Path.cwd(), output_dir, *paths], list(filter(Path.exists, named)))
    if is_of_ours(folder, output_dir):
        raise InputError(f"--save_model {folder}: is a name of the output folder's own files; name another")
    caches = [_hub_home(), Path(os.environ.get("HF_HUB_CACHE") or _hub_home()), getattr(args, "cache_dir", None)]
    if cache := next((cache for cache in caches if cache and cache.resolve() in folder.resolve().parents), None):
        raise InputError(f"--save_model {folder}: lies in the cache of the hub, {cache}; name another folder")
    keep_modules_elsewhere()
    is_own = args.resume and resume_state.was_saved(output_dir / STATE, folder)
    is_finished = args.resume and (output_dir / RESULT).exists() and resume_state.read(output_dir / STATE) is None
    if not is_own and not is_finished:
        check_model_target(folder, args.overwrite)


def check_prompts(args: argparse.Namespace) -> list[Path]:
    """The file of prompts, if there is one. Raises `InputError` for one that cannot be read."""
    if not args.prompts:
        return []
    read_prompts(args.prompts)
    return [args.prompts]


def check_apart(outputs: Mapping[str, Path | None], texts: Iterable[str]) -> None:
    """Raises `InputError` for an output, by its flag, in a folder of text: the next run would read it as text."""
    for text in texts:
        folder = parse_text(text).path
        for flag, output in outputs.items():
            if output and folder.is_dir() and folder.resolve() in (output.resolve(), *output.resolve().parents):
                raise InputError(f"{flag} {output}: lies in the folder of text {text}; name another")


def check_grid_output(args: argparse.Namespace) -> None:
    """Raises `InputError` unless the folder of a grid can be written and holds nothing else of our names."""
    if args.save_model:
        raise InputError("--save_model: saves one model; leave it out, or give one value for each flag")
    if args.dry_run:
        raise InputError("--dry_run: is of a single run; leave it out, or give one value for each flag")
    if args.prompts:
        raise InputError("--prompts: are of a single run; leave them out, or give one value for each flag")
    if launched().is_first:
        check_output_folder(args.output_dir, "grid")
        check_state_folder(args.output_dir / STATE, f"--output_dir {args.output_dir}")


def _hub_home() -> Path:
    """The folder that the hub's libraries keep their files in."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{cache}/huggingface")).expanduser()


def keep_modules_elsewhere() -> None:
    """Lets transformers, imported later, keep the code of models in a temporary folder if it cannot in its own."""
    if "HF_MODULES_CACHE" not in os.environ:
        try:
            check_writable(_hub_home() / "modules", "HF_HOME")
        except InputError:
            folder = tempfile.TemporaryDirectory(prefix="modules-")
            atexit.register(folder.cleanup)
            os.environ["HF_MODULES_CACHE"] = folder.name


def prefer_cache_without_network() -> None:
    """Makes the hub libraries, imported later, use their cache at once when the hub cannot be reached."""
    if "HF_HUB_OFFLINE" in os.environ or any(name.lower() == "https_proxy" for name in os.environ):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
