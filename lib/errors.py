"""The errors that end a run early, and one line for whatever else can end it. Imports no torch."""

import difflib
import errno
import os
import re
from collections.abc import Collection, Iterable, Iterator


class InputError(Exception):
    """User input that cannot be used (exit status 2). The message names it and says how to fix it."""


class RunError(Exception):
    """The run cannot continue (exit status 1). The message says why, and where in the model it happened."""


class InputsChanged(RunError):
    """What the run reads was changed while it worked: it has no result, and what it kept is of no use."""


START_OVER = "begin anew with --overwrite, and without --resume"  # advice for broken files of an earlier run
INSTALL = "pip install -r requirements.txt -c constraints.txt"
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy", "tqdm")  # those of requirements.txt
_WITH_THEM = ("safetensors", "tokenizers", "huggingface_hub", "pyarrow", "yaml")  # which they bring
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errno values
_FULL_DISK_TEXTS = re.compile(  # of the system, numpy, and torch's serialization, whose errors have no errno
    r"No space left on device|\d+ requested and \d+ written|PytorchStreamWriter failed writing|unexpected pos \d+ vs"
)
_DISK_ADVICE = {
    errno.EROFS: "name a folder on another disk",
    errno.EIO: "the disk or its connection has a fault; name a folder on another",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "a link leads back to itself; mend it",
}
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")  # in errors of safetensors and tokenizers
_OUT_OF_MEMORY_TEXTS = (  # of torch, and of CUDA's libraries; cuBLAS cannot start either where memory is full
    *("out of memory", "can't allocate memory", "not enough memory", "cudaErrorMemoryAllocation"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUSOLVER_STATUS_ALLOC_FAILED"),
    *("CUSPARSE_STATUS_ALLOC_FAILED", "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES", "CUDNN_STATUS_ALLOC_FAILED"),
)
_POINTS_ELSEWHERE = {  # words of a line that explains nothing -> what it means
    "the above report": "its weights have other shapes than its config says, or could not be converted",
}
_LONGEST = 300  # characters of a line that is quoted from a library


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors that torch raises when device or host memory runs out. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def is_interrupt(error: BaseException) -> bool:
    """True for the user's Ctrl-C, and for an error that says what it left."""
    return isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt)


def printable(text: str) -> str:
    """The text with its control characters as escapes: names in files of others may hold codes for terminals."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The text on one line, printable."""
    return printable(" ".join(text.split()))


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says something, printable, of at most 300 characters."""
    text = str(error)[: 100 * _LONGEST]
    for words, meaning in _POINTS_ELSEWHERE.items():
        if words in text:
            return meaning
    lines = [one_line(line) for line in text.splitlines() if re.search(r"\w", line)] or [""]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if not first or isinstance(error, LookupError):  # a missing key is all that the text of a KeyError says
        first = f"{type(error).__name__}: {first}".rstrip(": ")
    return first if len(first) <= _LONGEST else first[: _LONGEST - 3] + "..."


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that was probably meant: one of few other letters, or that begins or ends alike; None without."""
    key, by_key = _key(word), {_key(option): option for option in options}
    alike = [one for one in by_key if one.startswith(key) or key.startswith(f"{one}_") or key.endswith(f"_{one}")]
    close = [difflib.get_close_matches(key, by_key, n=1, cutoff=cutoff) for cutoff in (0.8, 0.7)]
    found = [*close[0], *sorted(alike, key=len), *close[1]] if key else []
    return by_key[found[0]] if found else None


def did_you_mean(word: str, options: Collection[str]) -> str:
    """Advice on a word that is none of the options: the nearest, or all of them if none is near."""
    found = nearest(word, options)
    return f"did you mean {found}?" if found else f"choose from {', '.join(options)}"


def _key(word: str) -> str:
    return word.strip().strip("-").lower().replace("-", "_")


def describe_disk(error: BaseException, path: os.PathLike | None = None) -> str | None:
    """One line for what a disk or file system refused, of Python or of a library; None for other errors.

    `path` is what was being written, where the error does not say.
    """
    number, given = _errno(error), path or getattr(error, "filename", None)
    place = os.fsdecode(given) if isinstance(given, str | bytes | os.PathLike) else ""
    if number in FULL_DISK or _FULL_DISK_TEXTS.search(str(error)):
        if not place:
            return "no space left on the disk; free some"
        return one_line(f"no space left to write {place}; free some, or name a folder on another disk")
    if number in _DISK_ADVICE:
        what = str(error) if isinstance(error, RuntimeError) else os.strerror(number)
        return one_line(f"{f'{place}: ' if place else ''}{what}; {_DISK_ADVICE[number]}")
    return None


def _errno(error: BaseException) -> int:
    """The errno of an error, 0 for none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from"):  # of Python before 3.13
        return errno.ELOOP
    found = _RUST_ERRNO.search(str(error))
    return int(found[1] or found[2]) if found else 0


def describe_failure(error: BaseException) -> str | None:
    """One line for an error that the user caused or can fix; None for a bug in the program."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, InputError | RunError):
        return one_line(str(error))
    if is_out_of_memory(error):
        return (
            "out of memory, though batches were made smaller where that helps; lower --seqlen (of gradients "
            "--grad_seqlen), use --dtype bfloat16, or (but for healing) --offload cpu or disk"
        )
    if isinstance(error, ImportError):
        return _describe_import(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{one_line(str(error.object))[:_LONGEST]}: a name that is not UTF-8; rename it"
    is_of_a_file = isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or _errno(error)
    return describe_disk(error) or (one_line(str(error)) if is_of_a_file else None)


def _describe_import(error: ImportError) -> str | None:
    """One line for a package that is missing, too old or broken; None where another module is missing."""
    for one in _causes(error):
        package = (getattr(one, "name", None) or "").partition(".")[0]
        if package in (*PACKAGES, *_WITH_THEM):
            is_missing = isinstance(one, ModuleNotFoundError) and one.name == package
            problem = "is not installed" if is_missing else f"does not fit this program ({first_line(one)})"
            return f"the package {package} {problem}; install what is needed: {INSTALL}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    while error:
        yield error
        error = error.__cause__
