"""The lines of a UTF-8 file, one after another, with the progress of a large one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from fed.data.tokenization import Stage
from fed.errors import FedError
from fed.files import why_not_utf8

BYTE_ORDER_MARK = "\ufeff"
_MB = 10**6
_SHOWN_FROM = 20  # MB, which take about a second to read
_STEPS = 20  # how often the progress of a file is shown


def read_lines(path: Path, key: str, stage: Stage | None) -> Generator[str, None, None]:
    r"""Yield the lines of a file with their ends, which are "\n", "\r\n" or "\r", without a byte order mark.

    Raises FedError, with `key` as the name of the setting, if the file cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, megabytes(path, stage) as advance:
            for line in file:
                if "\0" in line:
                    raise ValueError(why_not_utf8(path))
                advance(len(line))
                yield line
    except UnicodeDecodeError:
        raise unreadable(path, key, why_not_utf8(path)) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, key, error) from None


def unreadable(path: Path, key: str, reason: object) -> FedError:
    """Return the error that a file cannot be read as UTF-8 text; `key` is the name of the setting that names it."""
    return FedError(f"{key} is {str(path)!r}: cannot read it as UTF-8 text: {reason}")


@contextmanager
def megabytes(path: Path, stage: Stage | None) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of bytes read since the last call; a stage shows it for a large file."""
    total = path.stat().st_size // _MB
    if stage is None or total < _SHOWN_FROM:
        yield _show_nothing
        return
    read = due = 0
    with stage(f"reading {path.name}: MB", total) as show:

        def advance(size: int) -> None:
            nonlocal read, due
            read += size
            if read >= due:
                show(min(read // _MB, total), "")
                due = read + total * _MB // _STEPS

        yield advance
        show(total, "")


def _show_nothing(size: int) -> None:
    pass
