"""The file of `--prompts`: what the models of a run are to continue. Imports no torch."""

from pathlib import Path

from lib.errors import InputError
from lib.files import read_file

_MOST = 100  # prompts, since people read what comes of them
_LARGEST = 2**20  # bytes


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; blank lines are ignored. Raises `InputError`."""
    try:
        text = read_file(path, _LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--prompts {path}: is not UTF-8; convert it") from error
    except FileNotFoundError as error:
        raise InputError(f"--prompts {path}: no such file; give a text file with one prompt a line") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--prompts {path}: cannot be read ({reason}); give a text file") from error
    if "\0" in text:
        raise InputError(f"--prompts {path}: holds NUL characters, so it is no text in UTF-8; convert it")
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"--prompts {path}: holds no prompt; give a text file with one prompt a line")
    if len(prompts) > _MOST:
        raise InputError(f"--prompts {path}: holds {len(prompts):,} prompts; give at most {_MOST}")
    return prompts
