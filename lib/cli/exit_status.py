"""What surrounds a script: exit statuses, and one line on stderr for an error. Imports no torch."""

import sys
from collections.abc import Callable

from lib.errors import InputError, describe_failure
from lib.runtime.launcher import launched


def run_script(program: str, main: Callable[[], None]) -> int:
    """Runs the main function of a script; returns its exit status: 0 done, 1 failed, 2 bad input."""
    rank = 0
    try:
        rank = launched().rank
        main()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = describe_failure(error)
        if message is None:
            raise
        is_input = isinstance(error, InputError)
    if rank:
        message = f"process {rank}: {message}"
    print(f"{program}: {'error' if is_input else 'failed'}: {message}", file=sys.stderr)
    return 2 if is_input else 1
