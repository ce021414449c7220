"""Block tables: written, read back, looked up by the nearest shape; defaults where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import plora_kernels as pk
from plora_kernels import configs
from plora_kernels.blocks import (
    OPS,
    Blocks,
    FoldBlocks,
    GradientBlocks,
    MatmulBlocks,
    OutputGradientBlocks,
    ShapeClass,
    SideBlocks,
    candidates,
    default_blocks,
)
from plora_kernels.tables import Entry, Table, device_key, load_table, save_table, user_folder

GPU = torch.device("cuda", 0)


def forward_class(m: int = 8192, d_in: int = 4096, d_out: int = 4096, r: int = 16) -> ShapeClass:
    return ShapeClass("forward", "bfloat16", m, d_in, d_out, r)


def entry(shape: ShapeClass, block_m: int) -> Entry:
    return Entry(shape, MatmulBlocks("tile", block_m, 128, 64, 16, 8, 4, 3), 0.5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Pretend that there is an sm_90 device called Thing 1; return the user's folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Thing 1")
    monkeypatch.setattr(configs, "capability_of", lambda device: 90)
    monkeypatch.setattr(configs, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "user"))
    configs.forget_tables()
    yield tmp_path
    configs.forget_tables()


def test_a_table_is_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "thing.json"
    fold = Entry(ShapeClass("fold", "float16", 64, 32, 64, 8), FoldBlocks(16, 64, 16, 4, 2), 0.25)
    save_table(path, [entry(forward_class(), 64), fold], {"device": "Thing", "capability": 90})
    table = load_table(path)
    assert table.entries == (entry(forward_class(), 64), fold)
    assert table.meta == {"device": "Thing", "capability": 90}
    assert [file.name for file in path.parent.iterdir()] == ["thing.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"meta": {}}', '{"meta": {}, "entries": [{"op": "forward"}]}'])
def test_a_file_that_is_no_table_is_an_error_that_names_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(pk.ConfigError, match=r"bad\.json is not a table.*python -m bench\.tune"):
        load_table(tmp_path / "bad.json")


def test_the_nearest_shape_wins_and_fewer_modules_lose() -> None:
    few, many = entry(forward_class(r=16), 32), entry(forward_class(r=64), 64)
    other = entry(forward_class(m=16), 16)
    table = Table({}, (few, many, other))
    assert configs.nearest(table, forward_class(r=16)) == few
    assert configs.nearest(table, forward_class(r=20)) == many  # 16 modules at a time would read x twice
    assert configs.nearest(table, forward_class(m=1, d_in=2048)) == other
    assert configs.nearest(table, ShapeClass("fold", "bfloat16", 8, 8, 8, 8)) is None


def test_the_users_table_goes_before_the_packaged_one(gpu: Path) -> None:
    shape = forward_class()
    default = configs.find_blocks(MatmulBlocks, shape, GPU, True)
    assert default == default_blocks(shape, 90, True)
    save_table(gpu / "packaged" / "other-device.json", [entry(shape, 16)], {"capability": 90})
    save_table(gpu / "packaged" / "older.json", [entry(shape, 128)], {"capability": 80})
    assert configs.find_blocks(MatmulBlocks, shape, GPU, True) == default  # tables are read once
    configs.forget_tables()
    assert configs.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 16
    save_table(gpu / "packaged" / "thing-1.json", [entry(shape, 32)], {"capability": 90})
    configs.forget_tables()
    assert configs.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 32
    save_table(gpu / "user" / "thing-1.json", [entry(shape, 64)], {"capability": 90})
    configs.forget_tables()
    assert configs.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 64
    assert configs.find_blocks(MatmulBlocks, shape, GPU, False) == default_blocks(shape, 90, False)


def test_an_unreadable_table_is_passed_over_with_a_warning(gpu: Path) -> None:
    (gpu / "user").mkdir()
    (gpu / "user" / "thing-1.json").write_text("{")
    with pytest.warns(UserWarning, match=r"thing-1\.json is not a table"):
        blocks = configs.find_blocks(MatmulBlocks, forward_class(), GPU, True)
    assert blocks == default_blocks(forward_class(), 90, True)


def test_forcing_holds_inside_its_block_alone() -> None:
    forced = MatmulBlocks("tile", 16, 16, 16, 16, 1, 1, 1)
    cpu = torch.device("cpu")
    with configs.forcing({"forward": forced}):
        assert configs.find_blocks(MatmulBlocks, forward_class(), cpu, False) == forced
        with pytest.raises(pk.ConfigError, match="FoldBlocks is needed"):
            configs.find_blocks(FoldBlocks, forward_class(), cpu, False)
    assert configs.find_blocks(MatmulBlocks, forward_class(), cpu, False) != forced


def test_names_and_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert device_key("NVIDIA H200") == "nvidia-h200"
    assert device_key("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942"
    monkeypatch.delenv("PLORA_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_folder() == tmp_path / "plora_kernels"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [0, 80, 90])
def test_candidates_begin_with_the_default_and_do_not_repeat(op: str, capability: int) -> None:
    for m, r in ((8192, 16), (1, 256)):
        shape = ShapeClass(op, "bfloat16", m, 4096, 2048, r)
        found = candidates(shape, capability)
        assert found[0] == default_blocks(shape, capability, True)
        assert len(set(found)) == len(found) > 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("capability", "kibibytes"), [(0, 64), (75, 64), (80, 163), (86, 99), (90, 227), (120, 99)])
def test_what_candidates_hold_in_shared_memory_fits_the_device(capability: int, kibibytes: int, dtype: str) -> None:
    def held(blocks: Blocks) -> int:
        """Return the elements of the two large tiles a program has on their way, in all stages."""
        if isinstance(blocks, MatmulBlocks):
            return (blocks.block_m + blocks.block_n) * blocks.block_k * blocks.num_stages
        if isinstance(blocks, SideBlocks):
            return (blocks.block_m + blocks.block_r) * blocks.block_k * blocks.num_stages
        if isinstance(blocks, GradientBlocks):
            return (blocks.block_d + blocks.block_r) * blocks.block_m * blocks.num_stages
        if isinstance(blocks, OutputGradientBlocks):
            return (blocks.block_n + blocks.block_r) * blocks.block_m * blocks.num_stages
        return 0

    itemsize = 4 if dtype == "float32" else 2
    for op in OPS:
        for blocks in candidates(ShapeClass(op, dtype, 8192, 4096, 4096, 64), capability)[1:]:
            kernels = not isinstance(blocks, MatmulBlocks) or blocks.design != "algebra"
            assert not kernels or itemsize * held(blocks) <= 1024 * kibibytes, blocks
