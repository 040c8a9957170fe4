"""The two ways in which a run ends early; the scripts turn them into one line on stderr and an exit status."""

import errno


class InputError(Exception):
    """Something given by the user cannot be used (exit status 2). The message names it and says how to mend it."""


class RunError(Exception):
    """The run cannot go on (exit status 1). The message says why, and where in the model it happened."""


START_OVER = "begin anew with --overwrite, and without --resume"  # what to do about work that is broken
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # numbers of operating system errors
_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device or the host has no memory left. Needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)


def describe_failure(error: BaseException) -> str | None:
    """One line for an error that a user can do something about, or that they made; None for a fault of the program."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"no space left on the disk{f' for {error.filename}' if error.filename else ''}; free some"
    if isinstance(error, InputError | RunError | OSError):
        return " ".join(str(error).split())
    if is_out_of_memory(error):
        return (
            "out of memory, with batches as small as can be; lower --seqlen (of gradients --grad_seqlen), "
            "use --dtype bfloat16, or --offload cpu or disk"
        )
    return None
