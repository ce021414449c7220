"""Block tables: saving, loading, look-up by the nearest shape, and defaults without a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import plora_kernels as pk
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    KINDS,
    OPS,
    POINTER_DESIGNS,
    Blocks,
    FoldBlocks,
    GradientBlocks,
    Hardware,
    MatmulBlocks,
    OutputGradientBlocks,
    ShapeClass,
    SideBlocks,
)
from plora_kernels.tuning.candidates import candidates
from plora_kernels.tuning.defaults import default_blocks, pointer_blocks
from plora_kernels.tuning.tables import Entry, Table, device_key, load_table, save_table, user_folder

H200 = Hardware(90, 132)
GPU = torch.device("cuda", 0)


def forward_class(m: int = 8192, d_in: int = 4096, d_out: int = 4096, r: int = 16) -> ShapeClass:
    return ShapeClass("forward", "bfloat16", m, d_in, d_out, r)


def entry(shape: ShapeClass, block_m: int) -> Entry:
    return Entry(shape, MatmulBlocks("tile", block_m, 128, 64, 16, 8, 4, 3), 0.5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Pretend that there is an sm_90 device named Thing 1; return the folder for the user's tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Thing 1")
    monkeypatch.setattr(lookup, "hardware_of", lambda device: H200)
    monkeypatch.setattr(lookup, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "user"))
    lookup.forget_tables()
    yield tmp_path
    lookup.forget_tables()


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
    assert lookup.nearest(table, forward_class(r=16), H200) == few
    assert lookup.nearest(table, forward_class(r=20), H200) == many  # 16 modules at a time would read x twice
    assert lookup.nearest(table, forward_class(m=1, d_in=2048), H200) == other
    assert lookup.nearest(table, ShapeClass("fold", "bfloat16", 8, 8, 8, 8), H200) is None


@pytest.mark.parametrize(
    ("wanted", "is_found"),
    [
        ({"m": 2048}, True),
        ({"m": 32768}, True),
        ({"m": 2047}, False),
        ({"m": 1}, False),
        ({"d_in": 14336, "d_out": 14336}, True),
        ({"d_in": 1024, "d_out": 1024}, True),
        ({"d_in": 512, "d_out": 1024}, False),
        ({"r": 5}, True),
        ({"r": 17}, False),  # its blocks would go over the modules in a loop
    ],
)
def test_an_entry_of_another_world_is_no_entry(wanted: dict[str, int], is_found: bool) -> None:
    table = Table({}, (Entry(forward_class(r=16), MatmulBlocks("two_launch", 128, 256, 64, 16, 8, 8, 3), 0.5),))
    assert (lookup.nearest(table, forward_class(**{"r": 16, **wanted}), H200) is not None) == is_found


def test_the_users_table_goes_before_the_packaged_one(gpu: Path) -> None:
    shape = forward_class()
    default = lookup.find_blocks(MatmulBlocks, shape, GPU, True)
    assert default == default_blocks(shape, H200, True)
    save_table(gpu / "packaged" / "other-device.json", [entry(shape, 16)], {"capability": 90})
    save_table(gpu / "packaged" / "older.json", [entry(shape, 128)], {"capability": 80})
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, True) == default  # tables are read once
    lookup.forget_tables()
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 16
    save_table(gpu / "packaged" / "thing-1.json", [entry(shape, 32)], {"capability": 90})
    lookup.forget_tables()
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 32
    save_table(gpu / "user" / "thing-1.json", [entry(shape, 64)], {"capability": 90})
    lookup.forget_tables()
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 64
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, False) == default_blocks(shape, H200, False)


def packaged(gpu: Path, name: str, block_m: int, capability: object, multiprocessors: int | None = None) -> None:
    meta = {"capability": capability} | ({"multiprocessors": multiprocessors} if multiprocessors else {})
    save_table(gpu / "packaged" / f"{name}.json", [entry(forward_class(), block_m)], meta)
    lookup.forget_tables()


def found(monkeypatch: pytest.MonkeyPatch, capability: int, multiprocessors: int = 132) -> int | None:
    """Return block_m of the table's entry that a device gets, or None for the default."""
    hardware = Hardware(capability, multiprocessors)
    monkeypatch.setattr(lookup, "hardware_of", lambda device: hardware)
    lookup.forget_tables()
    blocks = lookup.find_blocks(MatmulBlocks, forward_class(), GPU, True)
    return None if blocks == default_blocks(forward_class(), hardware, True) else blocks.block_m


def test_an_unknown_device_gets_the_table_of_the_one_most_like_it(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged(gpu, "a-hopper", 32, 90, 132)
    assert found(monkeypatch, 90) == 32
    # Blocks that compile for one generation may not compile for another.
    assert found(monkeypatch, 100, 148) is found(monkeypatch, 103) is None
    for other in (80, 86, 120, 0):
        assert found(monkeypatch, other) is None
    packaged(gpu, "b-blackwell", 64, 100, 148)
    assert found(monkeypatch, 103) == found(monkeypatch, 110) == 64
    assert found(monkeypatch, 90) == 32
    packaged(gpu, "c-small-hopper", 16, 90, 78)
    assert found(monkeypatch, 90, 84) == 16
    assert found(monkeypatch, 90, 128) == 32
    packaged(gpu, "d-ampere", 64, 80, 108)
    assert found(monkeypatch, 86) == found(monkeypatch, 120) == 64
    packaged(gpu, "e-nothing-said", 128, None)
    assert found(monkeypatch, 90) == 32


def test_blocks_that_do_not_fit_a_smaller_device_are_passed_over(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = forward_class()
    large = Entry(shape, MatmulBlocks("tile", 128, 256, 64, 16, 8, 8, 3), 0.5)  # 150 KiB of shared memory
    small = Entry(forward_class(m=2048), MatmulBlocks("tile", 64, 64, 32, 16, 8, 4, 3), 0.5)
    save_table(gpu / "packaged" / "a-thing.json", [large, small], {"capability": 80})
    assert found(monkeypatch, 80) == 128
    assert found(monkeypatch, 86) == 64


def test_what_a_table_lacks_is_looked_up_in_the_next(gpu: Path) -> None:
    shape = forward_class()
    fold = Entry(ShapeClass("fold", "bfloat16", 64, 32, 64, 8), FoldBlocks(16, 64, 16, 4, 2), 0.25)
    save_table(gpu / "user" / "thing-1.json", [fold], {"capability": 90})
    packaged(gpu, "a-hopper", 32, 90)
    assert lookup.find_blocks(MatmulBlocks, shape, GPU, True).block_m == 32
    assert lookup.find_blocks(FoldBlocks, fold.shape, GPU, True) == fold.blocks


def test_a_device_s_own_entries_are_never_too_large(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ShapeClass("factor_gradient", "bfloat16", 8192, 4096, 64, 64)
    own = Entry(shape, GradientBlocks(64, 128, 64, 4, 4, 3), 0.5)  # an estimate of 72 KiB, where LDS has 64
    save_table(gpu / "user" / "thing-1.json", [own], {"capability": 0})
    monkeypatch.setattr(lookup, "hardware_of", lambda device: Hardware(0, 304))
    lookup.forget_tables()
    assert lookup.find_blocks(GradientBlocks, shape, GPU, True) == own.blocks


def test_blocks_that_launches_take_can_be_noted() -> None:
    cpu = torch.device("cpu")
    with lookup.record_blocks() as taken:
        blocks = lookup.find_blocks(MatmulBlocks, forward_class(), cpu, False)
    lookup.find_blocks(FoldBlocks, ShapeClass("fold", "float32", 8, 8, 8, 8), cpu, False)
    assert taken == {"forward": blocks}


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (8192, 4096, (128, 256)),
        (1024, 4096, (128, 256)),  # 128 large tiles of 132
        (1, 4096, (16, 32)),  # 128 tiles of 132
        (16, 1024, (16, 32)),
        (16, 32000, (16, 128)),  # 125 tiles of 128 by 256 would be nearly empty
        (512, 1024, (64, 64)),  # 32 tiles become 128
        (512, 4096, (128, 128)),  # 128 already
        (4096, 1280, (128, 128)),  # 160 large tiles would leave most of a second round empty
        (37, 29, (32, 32)),
    ],
)
def test_small_products_are_cut_into_tiles_for_most_of_the_device(m: int, n: int, tile: tuple[int, int]) -> None:
    blocks = default_blocks(forward_class(m=m, d_out=n), H200, True)
    assert isinstance(blocks, MatmulBlocks)
    assert (blocks.block_m, blocks.block_n) == tile
    assert (blocks.design in POINTER_DESIGNS) == (tile != (128, 256))


@pytest.mark.parametrize(
    ("shape", "pointers", "descriptors"),
    [
        (forward_class(), "tile_two_launch", "two_launch"),  # 32 or 16 columns of tiles would repeat the side product
        (forward_class(d_in=768, d_out=768), "tile", "two_launch"),
        (forward_class(d_in=768, d_out=768, r=64), "tile_two_launch", "two_launch"),
        (forward_class(d_in=2048, d_out=2048), "tile_two_launch", "two_launch"),
        (forward_class(m=2048, r=32), "tile", "two_launch"),  # a large tile would spill with 32 modules in the loop
        (forward_class(m=512), "tile", None),  # too short to fill the device with a launch of its own
        (ShapeClass("forward", "float32", 8192, 768, 768, 16), "tile_two_launch", "algebra_first"),
    ],
)
def test_the_default_makes_the_side_product_first_where_that_costs_less(
    shape: ShapeClass, pointers: str, descriptors: str | None
) -> None:
    assert pointer_blocks(shape, H200, True).design == pointers
    default = default_blocks(shape, H200, True)
    assert isinstance(default, MatmulBlocks)
    assert default.design == (descriptors or pointers)
    for hardware, aligned in ((Hardware(100, 132), True), (H200, False)):
        of_pointers, other = pointer_blocks(shape, hardware, aligned), default_blocks(shape, hardware, aligned)
        assert other == (replace(of_pointers, design="algebra_first") if shape.dtype == "float32" else of_pointers)


def test_an_unreadable_table_is_passed_over_with_a_warning(gpu: Path) -> None:
    (gpu / "user").mkdir()
    (gpu / "user" / "thing-1.json").write_text("{")
    with pytest.warns(UserWarning, match=r"thing-1\.json is not a table"):
        blocks = lookup.find_blocks(MatmulBlocks, forward_class(), GPU, True)
    assert blocks == default_blocks(forward_class(), H200, True)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("design", "specialised", "design is 'specialised'; it must be one of"),
        ("overlap", "flatten", "unexpected keyword argument 'overlap'"),
    ],
)
def test_a_table_of_a_design_or_an_option_that_is_gone_is_passed_over_with_a_warning(
    name: str, value: str, why: str, gpu: Path
) -> None:
    path = gpu / "user" / "thing-1.json"
    save_table(path, [entry(forward_class(), 16)], {"capability": 90})
    saved = json.loads(path.read_text())
    saved["entries"][0]["blocks"][name] = value
    path.write_text(json.dumps(saved))
    why = rf"thing-1\.json is not a table.*{why}.*python -m bench\.tune"
    with pytest.raises(pk.ConfigError, match=why):
        load_table(path)
    with pytest.warns(UserWarning, match=why):
        blocks = lookup.find_blocks(MatmulBlocks, forward_class(), GPU, True)
    assert blocks == default_blocks(forward_class(), H200, True)


def test_forcing_holds_inside_its_block_alone() -> None:
    forced = MatmulBlocks("tile", 16, 16, 16, 16, 1, 1, 1)
    cpu = torch.device("cpu")
    with lookup.override_blocks({"forward": forced}):
        assert lookup.find_blocks(MatmulBlocks, forward_class(), cpu, False) == forced
        with pytest.raises(pk.ConfigError, match="FoldBlocks is needed"):
            lookup.find_blocks(FoldBlocks, forward_class(), cpu, False)
    assert lookup.find_blocks(MatmulBlocks, forward_class(), cpu, False) != forced


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
        found = candidates(shape, Hardware(capability, 100))
        assert found[0] == default_blocks(shape, Hardware(capability, 100), True)
        assert len(set(found)) == len(found) > 1


@pytest.mark.parametrize("op", [op for op in OPS if KINDS[op] is MatmulBlocks])
def test_candidates_of_float32_are_tiles_that_compile_in_seconds(op: str) -> None:
    def largest(dtype: str) -> int:
        found = candidates(ShapeClass(op, dtype, 8192, 4096, 4096, 16), Hardware(90, 132))
        return max(blocks.block_m * blocks.block_n for blocks in found if isinstance(blocks, MatmulBlocks))

    assert largest("float32") == 64 * 128
    assert largest("bfloat16") == 128 * 256


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("capability", "kibibytes"), [(0, 64), (75, 64), (80, 163), (86, 99), (90, 227), (120, 99)])
def test_what_candidates_hold_in_shared_memory_fits_the_device(capability: int, kibibytes: int, dtype: str) -> None:
    def held(blocks: Blocks) -> int:
        """Return how many elements of its two large tiles a program holds in all stages."""
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
        for blocks in candidates(ShapeClass(op, dtype, 8192, 4096, 4096, 64), Hardware(capability, 100))[1:]:
            kernels = not isinstance(blocks, MatmulBlocks) or blocks.design != "algebra"
            assert not kernels or itemsize * held(blocks) <= 1024 * kibibytes, blocks
