"""What stops a script: mistakes that the user can put right, and signals."""

import signal
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right. Printed as one line, exit status 2, no traceback."""


class Terminated(SystemExit):
    """SIGTERM, raised where the program stands so that what is open gets closed."""


def raise_stop(number: int, _frame: object) -> NoReturn:
    """Handle SIGINT or SIGTERM by an exception where the program stands, so that what is open gets closed."""
    if number == signal.SIGTERM:
        raise Terminated(143)
    raise KeyboardInterrupt
