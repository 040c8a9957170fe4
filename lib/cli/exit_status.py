"""What surrounds a script: exit statuses, and one line on stderr for an error. Imports no torch."""

import os
import sys
from collections.abc import Callable

from lib.errors import InputError, describe_failure


def is_first_process() -> bool:
    """True for the process that writes, when a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def run_script(program: str, main: Callable[[], None]) -> int:
    """Runs the main function of a script; returns its exit status: 0 done, 1 failed, 2 bad input."""
    try:
        main()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message = describe_failure(error)
        if message is None:
            raise
        is_input = isinstance(error, InputError)
    if not is_first_process():
        message = f"process {os.environ['RANK']}: {message}"
    print(f"{program}: {'error' if is_input else 'failed'}: {message}", file=sys.stderr)
    return 2 if is_input else 1
