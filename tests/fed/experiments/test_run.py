"""Checks of a run's adapter before anything is trained."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import plora_kernels as pk
from fed.config import load
from fed.experiments.run import check_adapter
from tests.support.architectures import SIZES


def test_an_adapter_that_could_not_be_saved_is_refused_before_the_run() -> None:
    # The first layer has a plain MLP and the second stacked experts, for which PEFT takes all down_proj.
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=8, **SIZES, **experts))
    weight = model.model.layers[0].mlp.down_proj.weight
    before = weight.detach().clone()
    with pytest.raises(pk.TargetError, match="it would adapt the stacked experts"):
        check_adapter(load("digits", ["adapter.target_modules=['q_proj','down_proj']"]), model)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert torch.equal(weight, before)
    check_adapter(load("digits", ["adapter.target_modules=['q_proj']"]), model)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
