"""Adapters from the Hugging Face hub, out of its cache: no network is reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file

import plora_kernels as pk
from tests.support.adapter_folders import INPUTS, Small, assert_unchanged, change_tensors, saved_by_peft, snapshot

FIRST, SECOND = "1" * 40, "2" * 40


def saved(directory: Path, factor: float) -> None:
    """Save an adapter whose factors are those of all others here, times a factor."""
    change_tensors(saved_by_peft(directory), lambda tensors: {key: factor * value for key, value in tensors.items()})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be offline, in an empty folder, with a hub's cache that holds two commits of "user/adapter"."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "hub" / "models--user--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SECOND)
    (repository / "refs" / "older").write_text(FIRST)
    for number, commit in enumerate((FIRST, SECOND)):
        for inside in ("", "parts/best"):
            saved(repository / "snapshots" / commit / inside, 1.0 + number + 2 * bool(inside))
    return tmp_path / "hub"


def loaded(*arguments: object, **options: object) -> torch.Tensor:
    model = Small().eval()
    pk.load_peft(model, *arguments, **options)
    return model(INPUTS)


@pytest.mark.parametrize(
    "options", [{}, {"revision": "older"}, {"revision": FIRST}, {"token": False}, {"revision": SECOND}], ids=str
)
def test_it_loads_what_peft_loads(options: dict) -> None:
    theirs = PeftModel.from_pretrained(Small(), "user/adapter", **options).eval()(INPUTS)
    torch.testing.assert_close(loaded("user/adapter", **options), theirs)
    assert torch.equal(loaded("user/adapter", local_files_only=True, **options), loaded("user/adapter", **options))


def test_commits_and_folders_differ(cache: Path) -> None:
    places = [{}, {"revision": "older"}, {"subfolder": "parts/best"}, {"revision": FIRST, "subfolder": "parts/best"}]
    found = [loaded("user/adapter", **place) for place in places]
    assert torch.equal(found[2], loaded(cache / "models--user--adapter" / "snapshots" / SECOND / "parts" / "best"))
    assert all(not torch.equal(one, two) for i, one in enumerate(found) for two in found[:i])


def test_another_cache(tmp_path: Path, cache: Path) -> None:
    expected = loaded("user/adapter")
    cache.rename(tmp_path / "elsewhere")
    assert torch.equal(loaded("user/adapter", cache_dir=tmp_path / "elsewhere"), expected)
    with pytest.raises(pk.ConfigError, match="nor an adapter on the hub"):
        loaded("user/adapter")


def test_a_folder_of_this_name_comes_first(tmp_path: Path) -> None:
    from_hub = loaded("user/adapter")
    saved(tmp_path / "user" / "adapter", 0.5)
    assert torch.equal(loaded("user/adapter"), loaded(tmp_path / "user/adapter"))
    assert not torch.equal(loaded("user/adapter"), from_hub)
    saved(tmp_path / "user" / "adapter" / "last", 0.25)
    assert torch.equal(loaded("user/adapter", subfolder="last"), loaded(tmp_path / "user/adapter/last"))
    shutil.rmtree(tmp_path / "user")
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "adapter").mkdir()  # without an adapter: no other is taken in its place
    with pytest.raises(pk.ConfigError, match=r"user/adapter/adapter_config\.json does not exist"):
        loaded("user/adapter")


def test_a_pickled_adapter_is_taken_where_there_is_no_other(cache: Path) -> None:
    expected = loaded("user/adapter")
    folder = cache / "models--user--adapter" / "snapshots" / SECOND
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert torch.equal(loaded("user/adapter"), expected)


def test_the_tensors_are_of_the_configurations_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    expected, fetched = loaded("user/adapter"), []
    real = huggingface_hub.hf_hub_download

    def moving(*arguments: object, **options: object) -> str:
        path = real(*arguments, **options)
        fetched.append(path)
        (cache / "models--user--adapter" / "refs" / "main").write_text(FIRST)  # a push between the two downloads
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", moving)
    assert torch.equal(loaded("user/adapter"), expected)
    assert [Path(path).parent.name for path in fetched] == [SECOND, SECOND]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "user/other",
            {},
            r"'user/other' is no folder here, nor an adapter on the hub or in its cache; adapter_config",
        ),
        ("user/adapter", {"revision": "newer"}, r"nor an adapter on the hub or in its cache at revision 'newer'"),
        (
            "user/adapter",
            {"subfolder": "none"},
            r"; none/adapter_config\.json cannot be had: .*offline mode is enabled",
        ),
        ("user/adapter", {"subfolder": 3}, "subfolder is 3; a path inside"),
        ("user/x..y", {}, "'user/x..y' is no folder here, nor an adapter"),
        ("./user/adapter", {}, r"user/adapter/adapter_config\.json does not exist"),
        ("adapter", {}, r"adapter/adapter_config\.json does not exist"),
        ("a/b/c", {}, r"a/b/c/adapter_config\.json does not exist"),
        (Path("user/adapter"), {}, r"user/adapter/adapter_config\.json does not exist"),
    ],
    ids=str,
)
def test_what_is_nowhere_is_a_clear_error(name: object, options: dict, message: str) -> None:
    model = Small()
    before = snapshot(model)
    with pytest.raises(pk.ConfigError, match=message) as refusal:
        pk.load_peft(model, name, **options)
    assert "\n" not in str(refusal.value)
    assert_unchanged(model, before)


def test_a_repository_without_tensors_is_named(cache: Path) -> None:
    (cache / "models--user--adapter" / "snapshots" / SECOND / "adapter_model.safetensors").unlink()
    with pytest.raises(
        pk.ConfigError, match=r"'user/adapter' has adapter_config\.json, but neither adapter_model\.safe"
    ):
        loaded("user/adapter")


def test_without_a_connection_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("Name or service not known\n(details)")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(pk.ConfigError, match=r"nor an adapter on the hub or in its cache: Name or service not known$"):
        loaded("user/adapter")
