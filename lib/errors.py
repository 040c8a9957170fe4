"""The errors that end a run early. The scripts print them as one line on stderr and set the exit status."""

import errno


class InputError(Exception):
    """User input that cannot be used (exit status 2). The message names it and says how to fix it."""


class RunError(Exception):
    """The run cannot continue (exit status 1). The message says why, and where in the model it happened."""


class InputsChanged(RunError):
    """What the run reads was changed while it worked: it has no result, and what it kept is of no use."""


START_OVER = "begin anew with --overwrite, and without --resume"  # advice for broken files of an earlier run
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errno values
_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors that torch raises when device or host memory runs out. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def printable(text: str) -> str:
    """The text with its control characters as escapes: names in files of others may hold codes for terminals."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def describe_failure(error: BaseException) -> str | None:
    """One line for an error that the user caused or can fix; None for a bug in the program."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"no space left on the disk{f' for {error.filename}' if error.filename else ''}; free some"
    if isinstance(error, InputError | RunError | OSError):
        return printable(" ".join(str(error).split()))
    if is_out_of_memory(error):
        return (
            "out of memory, with batches as small as can be; lower --seqlen (of gradients --grad_seqlen), "
            "use --dtype bfloat16, or --offload cpu or disk"
        )
    return None
