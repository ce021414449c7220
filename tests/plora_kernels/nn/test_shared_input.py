"""Layers of a model that read the same tensor: their products are fused, and each has its own selection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import plora_kernels as pk
from tests.support.attention import NAMES, Attention, gradients, make
from tests.support.models import adapted, tiny_bert, tiny_llama

TOKENS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("form", ["all", "folded", "frozen"])
@pytest.mark.parametrize(
    ("build", "targets", "groups"),
    [
        (tiny_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], 4),
        (tiny_bert, ["query", "key", "value"], 2),
        (tiny_bert, ["query", "value"], 2),
    ],
    ids=["llama", "bert", "bert-qv"],
)
def test_models_compute_and_train_as_without(
    build: Callable[[], nn.Module], targets: list[str], groups: int, form: str, launches: list[int]
) -> None:
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = build().double()
        handle = adapted(model, targets, std=0.3, fuse_projections=fused)
        assert len(handle.projections) == (groups if fused else 0)
        if form != "all":
            handle.select([0, 2], form)
        steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings).logits
            steps.zero_grad()
            logits.square().mean().backward()
            steps.step()
        results.append([logits.detach(), embeddings.grad, *gradients(model)])
    torch.testing.assert_close(*results)
    assert len(launches) == 2 * groups


def test_a_model_on_the_kernels(kernels: None, launches: list[int]) -> None:
    results = []
    for fused in (True, False):
        model, handle = make(fused, torch.float32)
        handle.select([1], "frozen")
        x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(x).sum().backward()
        results.append([x.grad, *gradients(model)])
    torch.testing.assert_close(*results)
    assert launches == [3]


def test_groups_are_those_that_fit_together() -> None:
    handle = pk.inject(
        tiny_llama(), pk.PLoRAConfig(target_modules=["q_proj", "v_proj", "up_proj"], fuse_projections=True)
    )
    prefix = "model.layers.{}.self_attn."
    assert handle.projections == tuple((f"{prefix}q_proj".format(i), f"{prefix}v_proj".format(i)) for i in range(2))
    model = Attention()
    model.k_proj = nn.Linear(8, 3)  # another input size, so it reads another tensor
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=NAMES, fuse_projections=True))
    assert handle.projections == (("q_proj", "v_proj"),)
    assert type(handle.layers["k_proj"]) is pk.FusedPLoRALinear
    model = tiny_llama()
    model.model.layers[0].self_attn.k_proj.double()
    config = pk.PLoRAConfig(rank=2, target_modules="model.layers.0.*[qk]_proj", fuse_projections=True)
    assert pk.inject(model, config).projections == ()


def test_every_layer_keeps_a_selection_of_its_own(launches: list[int]) -> None:
    results = []
    for fused in (True, False):
        model, handle = make(fused)
        handle.layers["q_proj"].select([3, 1], "folded")
        handle.layers["k_proj"].select([], "folded")
        handle.layers["v_proj"].select([0, 2, 4], "frozen")
        x = torch.ones(3, 7, dtype=torch.float64, requires_grad=True)
        model(x).sum().backward()
        assert handle.layers["k_proj"].lora_A.grad is None
        results.append([x.grad, *gradients(model)])
        handle.unfold()
        results[-1].append(model(x.detach()))
    torch.testing.assert_close(*results)
    assert launches == [3, 3]
