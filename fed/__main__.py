"""Entry point of `python -m fed`."""

import atexit
import os
import sys

from fed.cli import main
from fed.errors import INTERRUPTED

_interrupted: list[int] = []


def _leave() -> None:
    """End an interrupted process with its status, after what else is to be done at the end.

    Python itself ends a process by SIGINT, whatever its status, if KeyboardInterrupt came while C code ran Python's.
    """
    if _interrupted:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    atexit.register(_leave)  # first, so that it is called last
    try:
        main()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _interrupted.append(INTERRUPTED)
        raise
