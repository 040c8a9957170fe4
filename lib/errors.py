"""The two ways in which a run ends early; the scripts turn them into one line on stderr and an exit status."""


class InputError(Exception):
    """Something given by the user cannot be used (exit status 2). The message names it and says how to mend it."""


class RunError(Exception):
    """The run cannot go on (exit status 1). The message says why, and where in the model it happened."""
