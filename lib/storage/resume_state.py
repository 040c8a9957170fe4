"""Resume state: the finished parts of a run, kept in its output folder until the run ends. Does not import torch.

`state.json` maps names to finished results, with a digest of it all. Large results are files beside it, written
atomically and named by what they hold.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lib.errors import START_OVER, InputError, InputsChanged, RunError, describe_failure
from lib.files import digest_of_json, read_json
from lib.storage.atomic import atomic_file, atomic_folder, write_json
from lib.storage.model_folder import check_model_target, is_gguf_target, signature
from lib.storage.output_folder import RESULT, STATE
from lib.storage.state_folder import FILE, delete, discard, locked

_FORMAT, _SAVED = "state/2", "saved"


class Processes(Protocol):
    """The processes of a run (`lib.runtime.distributed.Ranks`): the first reads and writes the state for all."""

    @property
    def is_first(self) -> bool: ...

    def agree(self, function: Callable[[], Any]) -> Any: ...


class State:
    """The finished parts of a run, bound to its `key`: everything that the result depends on (`settings.key`)."""

    def __init__(self, folder: Path | None, key: dict, processes: Processes | None = None, resume: bool = False):
        """Reads an earlier state if `resume`; nothing is written before `session`. None keeps the state in memory only.

        Raises `InputError` for a state that is broken or has another key.
        """
        self._folder = folder
        self._lock: int | None = None  # descriptor of the locked file
        self._is_writer = folder is not None and (processes is None or processes.is_first)
        self.key = digest_of_json(key)
        self._seconds: dict[str, float] = {}
        self._values: dict[str, object] = {}
        content = None
        if folder and resume:
            content = processes.agree(partial(read, folder)) if processes else read(folder)
        if content and content["key"] != self.key:
            raise InputError(f"{folder}: holds work on other settings, text, another model or version; {_ADVICE}")
        self._resumes = content is not None
        if content:
            self._values, self._seconds = content["values"], content["seconds"]

    @classmethod
    def of_cell(cls, folder: Path, key: dict, processes: Processes) -> "State":
        """The state of one cell of a grid, or of one part of a run: resumes a state with that key, discards any other.

        While another run holds the folder, or it is no state, this state gets a folder of its own beside it.
        """

        def choose() -> tuple[str, bool]:
            try:
                if folder.is_dir():
                    os.close(locked(folder))
            except InputError:
                return f"{folder.name}-{os.getpid()}", False
            with suppress(InputError):
                content = read(folder)
                return folder.name, content is not None and content["key"] == digest_of_json(key)
            return folder.name, False

        name, resume = processes.agree(choose)
        return cls(folder.with_name(name), key, processes, resume)

    @property
    def folder(self) -> Path:
        """Where the state is kept; only for a state that was given a folder."""
        assert self._folder is not None, "this state is kept in memory only"
        return self._folder

    @contextmanager
    def session(self, seconds: dict[str, float]) -> Iterator[None]:
        """Locks the folder for this run. Deletes it when the block succeeds, or fails with nothing finished or usable.

        Adds the seconds of the resumed run to `seconds`, which are kept with the state. Raises `InputError` when
        another run holds the folder.
        """
        try:
            self._start(seconds)
            yield
            self.close()
        except InputsChanged:
            self.close()
            raise
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
            self._lock = locked(self.folder)
            self._write(self._values)  # first, so that the key covers every file added later

    @property
    def is_empty(self) -> bool:
        """True when nothing is finished."""
        return not self._values and not (self._folder and _has_layers(self._folder))

    def get(self, name: str, default=None):
        return self._values.get(name, default)

    def put(self, name: str, value: object) -> None:
        """Keeps a JSON value; once this returns, a kill or a power failure cannot lose it."""
        values = {**self._values, name: value}
        if self._is_writer:
            self._write(values)
        self._values = values  # only after the write has succeeded

    def _write(self, values: dict[str, object]) -> None:
        content = {"format": _FORMAT, "key": self.key, "values": values, "seconds": self._seconds}
        write_json(self.folder / FILE, {**content, "digest": digest_of_json(content)})

    def once(self, name: str, compute: Callable[[], object]):
        """The value kept under a name; computes and keeps it if there is none."""
        if name not in self._values:
            self.put(name, compute())
        return self._values[name]

    def close(self) -> None:
        """Deletes the state of a run that is finished, or of no use."""
        self._values = {}
        if self._lock is not None:
            delete(self.folder)
            self._release()

    def _release(self) -> None:
        """Unlocks the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def saving(self, folder: Path, overwrite: bool) -> Iterator[Path]:
        """Yields a temporary folder, or GGUF file, for a model, which replaces `folder` when the block succeeds.

        An existing model is replaced with `overwrite`, or if this run had saved it before it was killed. Raises
        `InputError` as `check_model_target` does.
        """
        is_own = _is_saved(self._values, folder)
        check_model_target(folder, overwrite or is_own)

        def keep(draft: Path) -> None:
            check_model_target(folder, overwrite or is_own)  # again: saving took its time
            self.put(_SAVED, {"folder": str(folder.resolve()), "signature": signature(draft)})

        if is_gguf_target(folder):
            folder.resolve().parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(folder.resolve()) as draft:
                yield draft
                keep(draft)
        else:
            with atomic_folder(folder, keep) as draft:
                yield draft

    @contextmanager
    def advise_resume(self, again: str) -> Iterator[None]:
        """Re-raises whatever ends the run early as a `RunError` that says what is kept and how to resume (`again`).

        Lets `InputError` and faults of the program through.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, InputError) or not (what := describe_failure(error)):
                raise
            if self.is_empty:
                raise RunError(f"{what}; nothing is finished yet, and the same command starts again") from error
            raise RunError(f"{what}; what is finished is kept: {again}") from error


_ADVICE = "give the settings it was begun with, another folder, or --overwrite without --resume to begin anew"


def read(folder: Path) -> dict | None:
    """The content of a state, or None. Raises `InputError` for a broken one."""
    path = folder / FILE
    try:
        content = read_json(path)
        found = content.pop("digest")
        is_state = content["format"] == _FORMAT and isinstance(content["key"], str)
        if not is_state or not all(isinstance(content[name], dict) for name in ("values", "seconds")):
            raise ValueError("no state of this version")
        if found != digest_of_json(content):
            raise ValueError("its digest does not match")
        if not all(type(n) in (int, float) and n >= 0 for n in content["seconds"].values()):
            raise ValueError("its seconds are no times")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: broken, so that run cannot go on ({error}); {START_OVER}") from error


def is_unfinished(folder: Path) -> bool:
    """True when the folder holds a finished part of an unfinished run. Raises `InputError` for a broken state."""
    content = read(folder)
    return content is not None and (bool(content["values"]) or _has_layers(folder))


def was_saved(folder: Path, model: Path) -> bool:
    """True when `model` is as the run whose state is in `folder` had saved it."""
    content = read(folder)
    return content is not None and _is_saved(content["values"], model)


def _is_saved(values: dict[str, Any], model: Path) -> bool:
    saved = values.get(_SAVED)
    return model.exists() and saved == {"folder": str(model.resolve()), "signature": signature(model)}


def how_to_resume(output_dir: Path) -> str:
    """The advice on how to resume the run of that folder."""
    is_named = any(word == "--output_dir" or word.startswith("--output_dir=") for word in sys.argv)
    return "the same command with --resume" + ("" if is_named else f" --output_dir {output_dir}") + " goes on"


def finished(output_dir: Path, key: dict, overwrite: bool) -> dict | None:
    """The result of a finished run with that key, or None.

    Raises `InputError` when the folder holds the result of another key, unless `overwrite`.
    """
    path, folder = output_dir / RESULT, output_dir / STATE
    if not path.exists() or read(folder):
        return None
    with suppress(OSError, ValueError, LookupError, TypeError):
        found = read_json(path)
        if found["key"] == digest_of_json(key):
            discard(folder)  # left by a run that was killed while it ended
            return found
    if overwrite:
        return None
    raise InputError(f"--output_dir {output_dir}: holds the result of other settings; {_ADVICE}")


def check_saved(result: dict, folder: Path | None, save_format: str) -> None:
    """Raises `InputError` unless a finished run's model is in `folder` as it was saved, in the format now asked for."""
    if folder is None:
        return
    if result.get("saved_model") != str(folder.resolve()) or result.get("saved") != signature(folder):
        raise InputError(
            f"--save_model {folder}: the run is finished, and its model is not there as it was saved; "
            "begin anew: --overwrite"
        )
    if (found := result.get("save_format", save_format)) != save_format:
        raise InputError(f"--save_format {save_format}: the run is finished and saved {found}; begin anew: --overwrite")


def _has_layers(folder: Path) -> bool:
    return any(folder.rglob("*.safetensors"))
