"""Heat maps of the cosines that a run saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from fed.errors import FedError
from fed.report.figure import LIGHT
from fed.report.run_figures import draw_similarity, similarity_panels


def save_round(directory: Path, number: int, cosine: float) -> None:
    """Save two modules and three clients: equal cosines for all pairs but one, which has none."""
    (directory / "similarity").mkdir(exist_ok=True)
    within = np.array([[1.0, cosine], [cosine, 1.0]])
    across = np.array([[0.9, cosine], [np.nan, 0.3]])
    clients = np.full((3, 3), cosine) + np.diag([1 - cosine] * 3)
    path = directory / "similarity" / f"round-{number}.npz"
    np.savez(path, within=within, across=across, clients=clients, ids=np.array([4, 7, 11]))


def test_there_is_a_row_of_maps_for_each_round_in_order(tmp_path: Path) -> None:
    save_round(tmp_path, 10, 0.5)
    save_round(tmp_path, 1, -0.2)
    found = similarity_panels(tmp_path)
    titles, images = [], []
    for panel in found:
        axes = Figure().subplots()
        panel.draw(axes, LIGHT)
        titles.append(axes.get_title())
        images.append(axes.images[0])
    assert titles == [
        f"Round {number}: {what}"
        for number in (1, 10)
        for what in ("within a client", "from client to client", "same module, two clients")
    ]
    assert images[0].get_array()[0, 1] == -0.2
    assert images[1].get_array().mask.tolist() == [[False, False], [True, False]]
    # Both rounds share one scale. A module's cosine with itself does not count, that with others' does.
    assert [image.get_clim() for image in images[:2]] == [(-0.5, 0.5), (-0.9, 0.9)]
    assert [image.get_clim() for image in images[3:5]] == [(-0.5, 0.5), (-0.9, 0.9)]
    assert [label.get_text() for label in images[2].axes.get_xticklabels()] == ["4", "7", "11"]


def test_the_picture_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    assert draw_similarity(tmp_path) is None
    save_round(tmp_path, 1, 0.1)
    path = draw_similarity(tmp_path)
    assert path == tmp_path / "similarity.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_maps_of_next_to_nothing_keep_a_span(tmp_path: Path) -> None:
    save_round(tmp_path, 1, 1e-9)
    axes = Figure().subplots()
    similarity_panels(tmp_path)[0].draw(axes, LIGHT)
    assert axes.images[0].get_clim() == (-0.05, 0.05)


@pytest.mark.parametrize("name", ["round-x.npz", "other.npz", "round-1.npz.tmp"])
def test_other_files_are_left_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "similarity").mkdir()
    (tmp_path / "similarity" / name).write_bytes(b"")
    assert similarity_panels(tmp_path) == []


@pytest.mark.parametrize("change", [lambda content: b"", lambda content: content[:-9], lambda content: b"?" * 99])
def test_a_damaged_file_is_named(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    save_round(tmp_path, 1, 0.5)
    path = tmp_path / "similarity" / "round-1.npz"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FedError, match=r"round-1.npz' is damaged; without it the report is made without its maps"):
        similarity_panels(tmp_path)
    np.savez(path, within=np.ones(3), across=np.ones((2, 2)), clients=np.ones((2, 2)), ids=np.array([0, 1]))
    with pytest.raises(FedError, match=r"round-1.npz' is damaged"):
        similarity_panels(tmp_path)
