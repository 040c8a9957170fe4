"""Checks of a command line that need no model, and the output folders that it names. Imports no torch."""

import argparse
import hashlib
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lib.cli.exit_status import is_first_process
from lib.config.keys import WITHOUT_EFFECT
from lib.config.sources import expand, is_hub_model, locate_model, short_name
from lib.errors import InputError
from lib.storage import results_jsonl, resume_state
from lib.storage.atomic import RESULT, check_model_folder, check_writable


def check_device(args: argparse.Namespace) -> None:
    """Raises `InputError` for a device map together with another way to place a model."""
    if args.device_map and args.device != "auto":
        raise InputError(f"--device {args.device} and --device_map {args.device_map}: give one of them")
    if args.device_map and args.offload != "auto":
        raise InputError(f"--offload {args.offload} and --device_map {args.device_map}: give one of them")
    are_several = int(os.environ.get("WORLD_SIZE", "1")) > 1  # processes, started by a launcher
    if args.device_map and are_several:
        raise InputError("--device_map: several processes have a device each; leave it out")
    if ":" in args.device and are_several:
        raise InputError(f"--device {args.device}: several processes have a device each; give its kind only")


def default_output_dir(tool: str, model: str) -> Path:
    """`runs/<tool>-<model>-<time>`, with a number appended if that exists."""
    base = Path("runs") / f"{tool}-{short_name(model)[:80]}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base.with_name(f"{base.name}-{number}") for number in range(2, 1000))
    return base if not base.exists() else next(name for name in names if not name.exists())


def is_grid(args: argparse.Namespace, axes: Sequence[str]) -> bool:
    """True when the arguments ask for several runs or a table."""
    return args.preset is not None or any(len(getattr(args, axis) or ()) > 1 for axis in axes)


def grid_output_dir(tool: str, args: argparse.Namespace) -> Path:
    """`runs/<tool>-<preset>-<digest>`: the same for the same arguments, so that the same command resumes."""
    asked = {name: str(value) for name, value in vars(args).items() if name not in WITHOUT_EFFECT[tool]}
    digest = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:8]
    return Path("runs") / f"{tool}-{args.preset or 'grid'}-{digest}"


def check_output(args: argparse.Namespace, model: str) -> None:
    """Raises `InputError` unless a run on `model` can write its files and overwrites nothing else."""
    if not is_first_process():
        return  # only the first process writes, and it may have begun
    output_dir = args.output_dir
    check_writable(output_dir or Path("runs"), "--output_dir")
    if args.resume and not output_dir:
        raise InputError("--resume: needs --output_dir, the folder of the run that is to go on")
    if output_dir and not args.overwrite and not args.resume:
        if (output_dir / RESULT).exists():
            raise InputError(f"--output_dir {output_dir}: holds a result; name another folder or add --overwrite")
        if resume_state.is_unfinished(output_dir / resume_state.FOLDER):
            advice = "add --resume to go on with it, or --overwrite to begin anew"
            raise InputError(f"--output_dir {output_dir}: holds unfinished work; {advice}")
    if output_dir and (output_dir / results_jsonl.FILE).exists():
        raise InputError(f"--output_dir {output_dir}: holds a grid of results; name another folder")
    if not args.save_model:
        return
    is_own = args.resume and resume_state.was_saving(output_dir / resume_state.FOLDER, args.save_model)
    is_finished = args.resume and (output_dir / RESULT).exists()  # then nothing is written, or the run is refused later
    if not is_own and not is_finished:
        check_model_folder(args.save_model, args.overwrite, "--save_model")
    target, output = args.save_model.resolve(), (output_dir or Path("runs")).resolve()
    if target == output or target in output.parents:
        raise InputError(f"--save_model {args.save_model}: --output_dir lies in it; name another folder")
    if not is_hub_model(model) and target == Path(locate_model(model)).resolve():
        raise InputError(f"--save_model {args.save_model}: is the model that is pruned; name another folder")


def check_apart(output_dir: Path, texts: Iterable[str]) -> None:
    """Raises `InputError` for an output folder inside a folder of text, which the next run would read as text."""
    for text in texts:
        folder = expand(text)
        if folder.is_dir() and folder.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
            raise InputError(f"--output_dir {output_dir}: lies in the folder of text {text}; name another")


def check_grid_output(args: argparse.Namespace) -> None:
    """Raises `InputError` unless the folder of a grid can be written and holds no result of a single run."""
    check_writable(args.output_dir, "--output_dir")
    if (args.output_dir / RESULT).exists():
        raise InputError(f"--output_dir {args.output_dir}: holds the result of a single run; name another folder")
    if args.save_model:
        raise InputError("--save_model: saves one model; leave it out, or give one value for each flag")


def prefer_cache_without_network() -> None:
    """Makes the hub libraries, imported later, use their cache at once when the hub cannot be reached."""
    if "HF_HUB_OFFLINE" in os.environ or any(name.lower() == "https_proxy" for name in os.environ):
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"
