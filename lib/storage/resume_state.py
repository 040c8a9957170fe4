"""Work in progress of a run, in its output folder until all is done, so that a killed run goes on. Imports no torch.

`state.json` has what is finished, each under a name; what is large lies in files beside it, which are named by what
they hold and are whole from the moment they have their names.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lib.errors import START_OVER, InputError, RunError, describe_failure
from lib.storage.atomic import RESULT, check_model_folder, clear_drafts, write_json
from lib.storage.results_jsonl import canonical

FOLDER, FILE = "state", "state.json"
_FORMAT, _LOCK, _SAVING = "state/1", "lock", "saving"


class Processes(Protocol):
    """Those of a run, `lib.runtime.distributed`; of several, the first decides what is taken over, and writes."""

    @property
    def is_first(self) -> bool: ...

    def agree(self, function: Callable[[], Any]) -> Any: ...


class State:
    """What a run has finished, bound to its `key`: all that its result depends on, see `settings.key`."""

    def __init__(self, folder: Path | None, key: dict, processes: Processes | None = None, resume: bool = False):
        """Reads what is there, when it `goes_on`; `session` begins to write. Without a folder it lives in this process.

        Raises `InputError` for a state that is broken or of another key.
        """
        self.folder, self._lock = folder, None
        self._is_writer = folder is not None and (processes is None or processes.is_first)
        self._digest = digest(key)
        self._seconds: dict[str, float] = {}
        self._values: dict[str, object] = {}
        content = None
        if folder and resume:
            content = processes.agree(partial(read, folder)) if processes else read(folder)
        if content and content["key"] != self._digest:
            raise InputError(f"{folder}: holds work on other settings, text or another model; {_ADVICE}")
        self._resumes = content is not None
        if content:
            self._values, self._seconds = content["values"], content["seconds"]

    @classmethod
    def of_cell(cls, folder: Path, key: dict, processes: Processes) -> "State":
        """For a cell of a grid, or a part of a run: goes on with a state of that key, and gives any other up.

        Where another run is at work on one, it has a folder of its own.
        """

        def choose() -> tuple[str, bool]:
            try:
                if folder.is_dir():
                    os.close(_locked(folder))
            except InputError:
                return f"{folder.name}-{os.getpid()}", False
            with suppress(InputError):
                content = read(folder)
                return folder.name, content is not None and content["key"] == digest(key)
            return folder.name, False

        name, goes_on = processes.agree(choose)
        return cls(folder.with_name(name), key, processes, goes_on)

    @contextmanager
    def session(self, seconds: dict[str, float]) -> Iterator[None]:
        """Inside, the folder is this run's own; it is gone when the block ends well, or before anything is finished.

        To `seconds`, which will be kept too, those of before are added. Raises `InputError` when another run is at work
        on it.
        """
        try:
            self._start(seconds)
            yield
            self.close()
        finally:
            if self.is_empty:
                self.close()
            self._release()

    def _start(self, seconds: dict[str, float]) -> None:
        if self._is_writer and not self._resumes:
            discard(self.folder)
        for name, before in self._seconds.items():
            seconds[name] = round(seconds.get(name, 0.0) + before, 3)
        self._seconds = seconds
        if self._is_writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            clear_drafts(self.folder / FILE)
            self._write(self._values)  # at once: whatever else is kept beside it is of this key

    @property
    def is_empty(self) -> bool:
        """True when nothing is finished."""
        return not self._values and not (self.folder and _has_layers(self.folder))

    def get(self, name: str, default=None):
        """What was put under a name."""
        return self._values.get(name, default)

    def put(self, name: str, value: object) -> None:
        """Keeps something that JSON can hold, from now on safe from a kill or a loss of power."""
        values = {**self._values, name: value}
        if self._is_writer:
            self._write(values)
        self._values = values  # now: what could not be written is not kept

    def _write(self, values: dict[str, object]) -> None:
        content = {"format": _FORMAT, "key": self._digest, "values": values, "seconds": self._seconds}
        write_json(self.folder / FILE, content)

    def once(self, name: str, compute: Callable[[], object]):
        """What is kept under a name, or else what `compute` gives, which is kept."""
        if name not in self._values:
            self.put(name, compute())
        return self._values[name]

    def close(self) -> None:
        """Deletes it all: the run is finished."""
        if self._lock is not None:
            (self.folder / FILE).unlink(missing_ok=True)  # first: the rest means nothing without it
            shutil.rmtree(self.folder, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        """Lets others work on it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim_model_folder(self, folder: Path, overwrite: bool) -> bool:
        """Says before a model is saved that a folder of that name is this run's own from now on.

        Gives whether what is there is to be replaced: by `overwrite`, or as it was the run's own before, which was
        killed while, or after, it wrote there. Raises `InputError` where `check_model_folder` does.
        """
        is_own = self.get(_SAVING) == str(folder.resolve())
        check_model_folder(folder, overwrite or is_own, "--save_model")
        if is_own:
            clear_drafts(folder.resolve())
        self.put(_SAVING, str(folder.resolve()))
        return overwrite or is_own

    @contextmanager
    def advise_resume(self, again: str) -> Iterator[None]:
        """Inside, whatever ends the run early is told with what is kept, and with how to go on, which `again` says."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, InputError) or not (what := describe_failure(error)):
                raise
            if self.is_empty:
                raise RunError(f"{what}; nothing is finished yet, and the same command starts again") from error
            raise RunError(f"{what}; what is finished is kept: {again}") from error


_ADVICE = "give the settings it was begun with, another folder, or --overwrite without --resume to begin anew"


def digest(key: dict) -> str:
    """What tells two keys apart."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()


def read(folder: Path) -> dict | None:
    """The content of a state; None where there is none. Raises `InputError` for one that is broken."""
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_state = content["format"] == _FORMAT and isinstance(content["key"], str)
        if not is_state or not all(isinstance(content[name], dict) for name in ("values", "seconds")):
            raise ValueError("no state of a run")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: broken, so that run cannot go on ({error}); {START_OVER}") from error


def is_unfinished(folder: Path) -> bool:
    """True when something of a run is kept in a folder. Raises `InputError` for a state that is broken."""
    content = read(folder)
    return content is not None and (bool(content["values"]) or _has_layers(folder))


def was_saving(folder: Path, model: Path) -> bool:
    """True when the run whose state is in a folder had begun to save its model to another."""
    content = read(folder)
    return content is not None and content["values"].get(_SAVING) == str(model.resolve())


def discard(folder: Path) -> None:
    """Deletes a state. Raises `InputError` when a run is at work on it."""
    if folder.is_dir():
        os.close(_locked(folder))
        (folder / FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def how_to_resume(output_dir: Path) -> str:
    """What is to be added to a command so that it goes on in a folder."""
    is_named = any(word == "--output_dir" or word.startswith("--output_dir=") for word in sys.argv)
    return "the same command with --resume" + ("" if is_named else f" --output_dir {output_dir}") + " goes on"


def finished(output_dir: Path, key: dict, overwrite: bool) -> dict | None:
    """The result of a run of that key, if the folder holds it and no work is left of the run; else None.

    Raises `InputError` for the result of another, unless it is to be overwritten.
    """
    path, folder = output_dir / RESULT, output_dir / FOLDER
    if not path.exists() or read(folder):
        return None
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == digest(key):
            discard(folder)  # what is left when a run is killed as it ends
            return found
    if overwrite:
        return None
    raise InputError(f"--output_dir {output_dir}: holds the result of other settings; {_ADVICE}")


def check_saved(result: dict, folder: Path | None) -> None:
    """Raises `InputError` when a run that is finished is asked to have saved its model where it did not."""
    if folder and result.get("saved_model") != str(folder.resolve()):
        raise InputError(
            f"--save_model {folder}: the run is finished and saved no model there; begin anew: --overwrite"
        )


def _has_layers(folder: Path) -> bool:
    return any(folder.rglob("*.safetensors"))


def _locked(folder: Path) -> int:
    """An open file that keeps other runs away from a state, for as long as this process lives."""
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{folder}: another run is at work on it; wait for it, or name another folder") from error
    return descriptor
