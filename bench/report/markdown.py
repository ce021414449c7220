"""Markdown: tables, versions and commits, and sections of documents."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.harness.records import ResultsError, write_text


def markers(name: str) -> tuple[str, str]:
    """Return the markers at the beginning and end of a section."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is flush left, the others flush right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def versions_text(versions: Mapping[str, str | None]) -> str:
    """Return the versions of the installed packages: "torch 2.13.0, peft 0.19.1"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def commit_text(commit: str | None) -> str:
    """Return "commit 0123456789ab", with a note that files differed from it if it ends in "+"."""
    if not commit:
        return "commit unknown"
    return f"commit {commit.rstrip('+')[:12]}{' with uncommitted changes' if commit.endswith('+') else ''}"


def rewrite_section(text: str, name: str, section: str) -> str:
    """Return `text` with the part between a section's two markers replaced.

    Raises ResultsError if the markers are not there exactly once each, in order.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultsError(f"the README needs the lines {begin} and {end}, once each and in this order")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def update_document(document: Path, name: str, section: str, png: Path | None = None, title: str = "") -> None:
    """Rewrite the part between a section's markers, with a link to the picture if there is one."""
    if not document.is_file():
        begin, end = markers(name)
        raise ResultsError(f"{document} does not exist; --document needs a file with {begin} and {end}")
    if png is not None:
        link = Path(os.path.relpath(png, document.parent)).as_posix()
        section = f"![{title}]({link})\n\n{section}"
    write_text(document, rewrite_section(document.read_text(encoding="utf-8"), name, section))
