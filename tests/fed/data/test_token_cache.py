"""Cached tensors: made once, not used for other settings or if damaged, written completely or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fed.data.token_cache import cached, user_directory

KEY = {"what": "test", "length": 3}


class Maker:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.said: list[str] = []

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"tokens": torch.arange(6, dtype=torch.int32), "ends": torch.tensor([2, 6])}

    def ask(self, directory: Path | None, key: dict[str, object] = KEY) -> dict[str, torch.Tensor]:
        return cached(directory, key, self, self.said.append)


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_what_was_made_once_is_read_the_next_time(tmp_path: Path) -> None:
    make = Maker()
    first, again = make.ask(tmp_path / "deep" / "cache"), make.ask(tmp_path / "deep" / "cache")
    assert (make.calls, make.said) == (1, [])
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert tensor.dtype == again[name].dtype
    assert only_file(tmp_path / "deep" / "cache").suffix == ".safetensors"


def test_other_settings_have_a_file_of_their_own(tmp_path: Path) -> None:
    make = Maker()
    make.ask(tmp_path)
    make.ask(tmp_path, {**KEY, "length": 4})
    assert make.calls == 2
    assert len(list(tmp_path.iterdir())) == 2


def of_other_settings(path: Path) -> None:
    save_file(load_file(path), path, {"key": json.dumps({"what": "other"}), "content": "?"})


DAMAGES = {
    "no tensors": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "one token changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "of other settings": of_other_settings,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_with_one_line(damage: str, tmp_path: Path) -> None:
    make = Maker()
    make.ask(tmp_path)
    DAMAGES[damage](only_file(tmp_path))
    assert make.ask(tmp_path)["tokens"].tolist() == list(range(6))
    assert make.calls == 2
    (line,) = make.said
    assert line.startswith(f"{only_file(tmp_path)} is damaged and is made anew: ")
    assert "\n" not in line
    make.ask(tmp_path)
    assert make.calls == 2


def test_no_directory_keeps_nothing_and_one_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make = Maker()
    make.ask(None)
    make.ask(None)
    assert (make.calls, make.said) == (2, [])
    (tmp_path / "file").write_text("")
    assert len(make.ask(tmp_path / "file" / "cache")) == 2
    assert make.said[0].startswith("tokens are not kept: ")


def test_the_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_directory() == tmp_path / "mine"
    monkeypatch.delenv("PLORA_KERNELS_CACHE")
    assert user_directory() == tmp_path / "xdg" / "plora_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_directory() == tmp_path / "home" / ".cache" / "plora_kernels"
