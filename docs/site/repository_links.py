"""Links out of docs/, as GitHub follows them, on the site: the files that pages link to become pages themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")  # the target of a relative link, and its anchor
_INDEX = "README.md"
_FOLDER = "repository"  # where on the site files from outside of docs/ are


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every folder, and every file outside of docs/, that a page links to, added ones included."""
    root, docs = _roots(config)
    waiting = [(root / docs / file.src_uri).resolve() for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        for target in _targets(waiting.pop(), root):
            inside = target.is_relative_to(root / docs)
            if target in seen or (inside and (target.is_file() or not target.parent.is_dir())):
                continue
            seen.add(target)
            if target.suffix == ".md" and target.is_file():
                waiting.append(target)
            if target.is_file() or target.name == _INDEX:
                files.append(File.generated(config, _uri(target, root, docs), content=_page(target, root)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the links of a page lead to where the site has their targets."""
    root, docs = _roots(config)
    own = page.file.src_uri
    source = root / docs / own
    if own.startswith(f"{_FOLDER}/"):
        source = root / PurePosixPath(own).relative_to(_FOLDER)
    depth = "../" * own.count("/")

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link[1])
        uri = _uri(target, root, docs)
        known = target.is_relative_to(root) and files.get_file_from_path(uri) is not None
        return f"{depth}{uri}{link[2] or ''}" if known else link[0]

    return _LINK.sub(moved, markdown)


def _roots(config: Any) -> tuple[Path, str]:
    """Return the repository's folder, and the name of the docs' folder in it."""
    docs = Path(config.docs_dir).resolve()
    return docs.parent, docs.name


def _targets(page: Path, root: Path) -> Iterator[Path]:
    """Yield what a page's relative links lead to in the repository."""
    for target, _ in _LINK.findall(page.read_text(encoding="utf-8")):
        path = _target(page, target)
        if path.is_relative_to(root):
            yield path


def _target(page: Path, link: str) -> Path:
    """Return what a link of a page leads to; a folder is meant by its index, which need not be there."""
    path = (page.parent / link).resolve()
    return path / _INDEX if path.is_dir() else path


def _uri(target: Path, root: Path, docs: str) -> str:
    """Return the path of a file of the repository on the site, as the source of a page."""
    if target.is_relative_to(root / docs):
        return target.relative_to(root / docs).as_posix()
    if not target.is_relative_to(root):
        return ""
    path = target.relative_to(root).as_posix()
    return f"{_FOLDER}/{path if target.suffix == '.md' else f'{path}.md'}"


def _page(target: Path, root: Path) -> str:
    """Return a file as a page, Markdown as it is and code as code, and a folder as a list of its files."""
    name = target.relative_to(root).as_posix()
    if not target.is_file():
        files = sorted(path.name for path in target.parent.iterdir() if path.is_file())
        return "\n".join([f"# {name.removesuffix(f'/{_INDEX}')}\n", *(f"- [{file}]({file})" for file in files), ""])
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".md":
        return text
    return f"# {name}\n\n````{target.suffix.removeprefix('.')}\n{text}````\n"
