"""Pictures of `bench.report.traffic`, as SVG: `python -m bench.report.traffic_pictures docs`.

A bar is a way to compute something, cut into its launches, and these into the tensors that they read (filled) and write
(hatched). They are drawn by hand here, so that the same bytes give the same file on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from bench.gpu_cases import GATE, TABLE_RANKS, TABLE_ROWS
from bench.harness.records import write_text
from bench.report.traffic import Launch, Shape, Way, backward, clients, fold, forward

# Okabe and Ito's colours, which colour-blind readers can distinguish, by a tensor's name without "d", "fp32" and "'".
COLOURS = {"x": "#0072B2", "y": "#009E73", "W": "#7F7F7F", "Z": "#D55E00", "BA": "#D55E00", "": "#CC79A7"}
MEANING = {
    "x": "x, dX",
    "y": "y, dY",
    "W": "W",
    "Z": "an update of all of y or W",
    "": "of width R: A, B, S, their gradients and partial sums",
}
WIDTH, LEFT, RIGHT = 1000, 178, 150  # of the picture, of the titles, of the totals
BAR, PITCH, TOP, GAP = 26, 62, 46, 4  # heights of a bar and a row, of the heading; between launches
LEAST_TEXT = 7.0  # pixels of width that a letter takes
RIM = 'stroke="#333" stroke-width="2.5" paint-order="stroke"'  # around white letters on a bar


def picture(heading: str, ways: Sequence[Way]) -> str:
    """Return the picture of some ways; the total of each is divided by that of the first."""
    most = max(way.bytes for way in ways)
    gaps = max(len(way.launches) for way in ways) * GAP
    scale = (WIDTH - LEFT - RIGHT - gaps) / most  # pixels a byte
    height = TOP + PITCH * len(ways) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<defs><pattern id="written" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="3" height="6" fill="white" fill-opacity="0.55"/></pattern></defs>',
        _text(10, 24, heading, size=15, weight="bold"),
    ]
    for number, way in enumerate(ways):
        parts += _row(way, TOP + PITCH * number, scale, ways[0].bytes)
    parts += _legend(ways, height - 16)
    return "\n".join([*parts, "</svg>", ""])


def _row(way: Way, top: float, scale: float, unit: int) -> list[str]:
    """Return a bar with its title, its launches' names and its total."""
    middle = top + BAR / 2 + 5
    parts = [_text(LEFT - 10, middle, way.title, anchor="end")]
    left = float(LEFT)
    for launch in way.launches:
        right = left + scale * way.times * launch.bytes
        parts += _launch(launch, left, top, scale * way.times)
        name = launch.name if len(launch.name) * LEAST_TEXT <= right - left else ""
        parts.append(_text((left + right) / 2, top + BAR + 15, name, anchor="middle", size=11, fill="#444"))
        left = right + GAP
    total = f"{way.bytes / 1e6:,.0f} MB ({way.bytes / unit:.2f})"
    return [*parts, _text(left + 4, middle, total, weight="bold")]


def _launch(launch: Launch, left: float, top: float, scale: float) -> list[str]:
    """Return the rectangles of what a launch reads and writes, and the names of those that have room for it."""
    parts = []
    moved = [(name, size, False) for name, size in launch.reads.items()]
    moved += [(name, size, True) for name, size in launch.writes.items()]
    for name, size, written in moved:
        width = scale * size
        box = f'x="{left:.2f}" y="{top}" width="{width:.2f}" height="{BAR}"'
        parts.append(f'<rect {box} fill="{COLOURS[_kind(name)]}"/>')
        if written:
            parts.append(f'<rect {box} fill="url(#written)"/>')
        short = name.removesuffix(" fp32")
        if width >= LEAST_TEXT * len(short) + 6:
            label = _text(left + width / 2, top + BAR / 2 + 5, short, anchor="middle", weight="bold", fill="white")
            parts.append(label.replace("<text", f"<text {RIM}"))
        left += width
    return parts


def _kind(name: str) -> str:
    """Return the key of a tensor's colour."""
    plain = name.removesuffix(" fp32").removesuffix("'")
    plain = {"dX": "x", "dY": "y", "dZ": "Z"}.get(plain, plain)
    return plain if plain in COLOURS else ""


def _legend(ways: Sequence[Way], y: float) -> list[str]:
    """Return the meaning of the colours that the bars have."""
    names = {name for way in ways for launch in way.launches for name in (*launch.reads, *launch.writes)}
    kinds = {"Z" if _kind(name) == "BA" else _kind(name) for name in names}
    parts, left = [], 10.0
    for kind, meaning in MEANING.items():
        if kind in kinds:
            parts += [f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{COLOURS[kind]}"/>']
            parts.append(_text(left + 17, y, meaning, size=12))
            left += 34 + 6.4 * len(meaning)
    parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="#444"/>')
    parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="url(#written)"/>')
    return [*parts, _text(left + 17, y, "hatched: written", size=12)]


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal", fill: str = "#111"
) -> str:
    """Return a line of text."""
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def pictures() -> dict[str, str]:
    """Return the pictures of docs/kernels.md by the name of their file."""
    shape = Shape(TABLE_ROWS, GATE.k, GATE.n, TABLE_RANKS[0])
    sizes = f"M {shape.m:,}, K {shape.k:,}, N {shape.n:,}, R {shape.r}, bf16"
    few = shape._replace(m=512)
    return {
        "traffic-forward.svg": picture(f"Forward: bytes read and written, {sizes}", forward(shape)),
        "traffic-backward.svg": picture(f"Backward (dX, dA, dB): bytes read and written, {sizes}", backward(shape)),
        "traffic-fold.svg": picture(f"Folding all modules: bytes, {sizes[sizes.index('K') :]}", fold(shape)),
        "traffic-clients.svg": picture(
            f"Forward of ten clients of {few.m} rows each: bytes, {sizes[sizes.index('K') :]}", clients(few, 10)
        ),
    }


def main(arguments: Sequence[str]) -> int:
    """Write the pictures to a folder."""
    if len(arguments) != 1:
        print("usage: python -m bench.report.traffic_pictures FOLDER", file=sys.stderr)
        return 2
    for name, text in pictures().items():
        write_text(Path(arguments[0]) / name, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
