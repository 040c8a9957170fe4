"""The two ways in which a run ends early; the scripts turn them into one line on stderr and an exit status."""


class InputError(Exception):
    """Something given by the user cannot be used (exit status 2). The message names it and says how to mend it."""


class RunError(Exception):
    """The run cannot go on (exit status 1). The message says why, and where in the model it happened."""


_OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch raises when a device or the host has no memory left. Needs no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
