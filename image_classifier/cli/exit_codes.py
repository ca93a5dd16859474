"""How the program ends: the exit code, and the line on standard error."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable

from image_classifier.errors import ClassifierError
from image_classifier.text import printable


def exit_code(action: Callable[[], None]) -> int:
    """Run the program and return its exit code; a bug keeps its traceback.

    Returns:
        0, or 2 and one line for what the user can correct, 130 for Ctrl-C, 141 where the reader of a pipe has left.
    """
    try:
        action()
        sys.stdout.flush()
    except ClassifierError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _reader_left():
            raise  # another pipe: a bug that must be seen
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush stays quiet
        return 141
    except (KeyboardInterrupt, ImportError, SystemExit) as error:
        if not _interrupted(error):
            raise
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    return 0


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused the error.

    An import of a C extension turns it into an ImportError, Lightning into exit code 1.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # an error can be its own cause
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _reader_left() -> bool:
    """Return whether standard output is a pipe that nobody reads any more (`| head`)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False
