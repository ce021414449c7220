"""Layers in two processes: DistributedDataParallel and fully_shard, before and after a selection."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import plora_kernels as pk

FORMS = (None, "folded", "frozen")


def in_two_processes(work: Callable[[int], None], folder: Path) -> None:
    """Run `work(rank)` in two processes of one gloo group; an exception in either one is raised here."""
    mp.spawn(_started, (work, str(folder / "rendezvous")), nprocs=2)


def _started(rank: int, work: Callable[[int], None], file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        work(rank)
    finally:
        dist.destroy_process_group()


def model_of(
    seed: int, size: int = 16, layers: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, pk.Injected]:
    """Return a model whose every layer is adapted, and its handle."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(size, size, dtype=dtype) for _ in range(layers)))
    handle = pk.inject(model, pk.PLoRAConfig(rank=8, target_modules="all-linear"))
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    return model, handle


def agree(*tensors: torch.Tensor) -> bool:
    """Say whether both processes hold the same tensors."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    found = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(found, flat)
    return torch.equal(*found)


def train(model: nn.Module, rank: int, size: int = 16) -> None:
    """Train for one step on rows of this process's own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(rank + 1)
    x = torch.randn(4, size).to(next(model.parameters()).dtype)
    model(x).float().square().mean().backward()
    optimizer.step()


def data_parallel(rank: int) -> None:
    """Check what DistributedDataParallel sends, that processes stay alike, and that stale wrappers raise."""
    sent = []
    send = dist._broadcast_coalesced
    dist._broadcast_coalesced = lambda group, tensors, *rest: (sent.append(len(tensors)), send(group, tensors, *rest))
    for form in FORMS:
        model, handle = model_of(0)
        if form is not None:
            handle.select([0, 3], form)
        wrapped = DistributedDataParallel(model)
        sent.clear()
        for _ in range(2):
            train(wrapped, rank)
        assert sent == [], f"{form}: tensors were sent at a forward"

    # Processes that start from other values are made alike once, unselected modules and original included.
    for form in ("folded", "frozen"):
        model, handle = model_of(rank)
        handle.select([0, 1], form)
        wrapped = DistributedDataParallel(model)
        for chosen in ([0, 1], [2, 3], [4, 7]):
            handle.select(chosen, form)
            train(wrapped, rank)
            assert agree(*handle.factors()["0"]), f"{form}: processes differ after {chosen}"
        handle.unfold()
        assert agree(model[0].weight)

    handle.select([0, 1])
    wrapped = DistributedDataParallel(model)
    handle.unfold()
    with pytest.raises(pk.StateError, match="wrap the model again"):
        wrapped(torch.randn(4, 16))
    handle.select([0, 1, 2])
    with pytest.raises(pk.StateError, match=r"wrap the model again after select\(\) with another number of modules"):
        wrapped(torch.randn(4, 16))
    handle.select([5, 6])  # as many as when it was wrapped
    train(wrapped, rank)
    assert agree(*handle.factors()["0"])
    train(DistributedDataParallel(model), rank)

    model, handle = model_of(0, layers=2)  # a wrapper may be told to leave an adapter alone
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.lora_A", "0.lora_B"])
    train(DistributedDataParallel(model), rank)
    assert not agree(*handle.factors()["0"])
    assert agree(*handle.factors()["1"])


def sharded(rank: int) -> None:
    """Check what works under fully_shard without a selection, and that a selection is refused before it trains."""
    mesh = dist.init_device_mesh("cpu", (2,))
    folder = Path(dist_file_folder())
    model, handle = model_of(0, layers=2)
    expected, x = model(torch.ones(4, 16)), torch.ones(4, 16)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(x), expected)
    train(model, rank)
    factors = handle.factors()
    assert all((tuple(A.shape), tuple(B.shape)) == ((8, 16), (16, 8)) for A, B in factors.values())
    assert agree(*factors["0"], *factors["1"])
    pk.save_peft(handle, folder / str(rank))
    loaded = pk.load_peft(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), folder / str(rank))
    assert torch.equal(loaded.factors()["1"][0], factors["1"][0])
    torch.testing.assert_close(handle.layers["0"].merge()(x), model[0](x))
    for form in ("folded", "frozen"):
        with pytest.raises(pk.StateError, match="fully_shard has divided the layer"):
            handle.select([0], form)
    with pytest.raises(pk.StateError, match="fully_shard has divided the layer: set the factors before"):
        handle.set_factors(factors)

    for form in ("folded", "frozen"):
        model, handle = model_of(0)
        handle.select([0, 1], form)
        fully_shard(model, mesh=mesh)
        for act in (
            partial(model, x),
            handle.factors,
            model.state_dict,
            handle.unfold,
            partial(handle.select, [2, 3]),
            partial(pk.save_peft, handle, folder / "none"),
        ):
            with pytest.raises(pk.StateError, match="fully_shard divided the layer while modules"):
                act()


def dist_file_folder() -> str:
    """Return a folder both processes know."""
    found = [None]
    if dist.get_rank() == 0:
        import tempfile

        found = [tempfile.mkdtemp()]
    dist.broadcast_object_list(found)
    return str(found[0])


def in_mixed_precision(rank: int) -> None:
    """Check fp32 factors over bf16 under both wrappers: as without a wrapper, and alike in all processes."""
    for form in FORMS:
        model, handle = model_of(rank, dtype=torch.bfloat16)
        if form is not None:
            handle.select([0, 3], form)
        train(DistributedDataParallel(model), rank)
        factors = handle.factors()["0"]
        assert [factor.dtype for factor in factors] == [torch.float32] * 2
        assert agree(*factors)
    mesh = dist.init_device_mesh("cpu", (2,))
    model, handle = model_of(0, layers=2, dtype=torch.bfloat16)
    before, x = handle.factors()["0"], torch.ones(4, 16).bfloat16()
    expected = model(x)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model(x), expected)
    train(model, rank)
    factors = handle.factors()["0"]
    assert [factor.dtype for factor in factors] == [torch.float32] * 2
    assert agree(*factors)
    assert not torch.equal(factors[0], before[0])
    state = model.state_dict()
    assert (state["0.weight"].dtype, state["0.lora_A"].dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("work", [data_parallel, sharded, in_mixed_precision], ids=lambda work: work.__name__)
def test_layers_in_two_processes(work: Callable[[int], None], tmp_path: Path) -> None:
    in_two_processes(work, tmp_path)
