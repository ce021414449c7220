"""Adapters loaded for inference: nothing requires a gradient, whatever is selected afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import plora_kernels as pk
from tests.support.adapter_folders import INPUTS, Small, saved_by_peft


def trainable(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_nothing_requires_a_gradient_and_the_model_is_evaluated(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, modules_to_save=["head"], lora_dropout=0.5)
    theirs = PeftModel.from_pretrained(Small(), tmp_path)
    model = Small().train()
    pk.load_peft(model, tmp_path, trainable=False)
    assert trainable(model) == trainable(theirs) == []
    assert not any(module.training for module in model.modules())
    y = model(INPUTS)
    assert not y.requires_grad
    torch.testing.assert_close(y, theirs(INPUTS))


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
def test_selections_keep_it(tmp_path: Path, unselected: str) -> None:
    saved_by_peft(tmp_path)
    model = Small()
    expected = Small()
    pk.load_peft(expected, tmp_path)
    handle = pk.load_peft(model, tmp_path, trainable=False)
    for chosen in ([0, 2], [1, 3], [], list(range(4))):
        handle.select(chosen, unselected)
        assert trainable(model) == []
        torch.testing.assert_close(model(INPUTS), expected(INPUTS).detach())
    handle.unfold()
    assert trainable(model) == []


def test_training_may_begin_later_and_restoring_gives_the_flags_back(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, modules_to_save=["head"])
    model, usual = Small(), Small()
    model.proj.bias.requires_grad_(False)
    handle = pk.load_peft(model, tmp_path, trainable=False)
    pk.load_peft(usual, tmp_path)
    handle.select([0])
    handle.set_trainable(True)
    assert trainable(model) == trainable(usual)
    handle.set_trainable(False)
    assert trainable(model) == []
    handle.restore()
    assert trainable(model) == [name for name in trainable(Small()) if name != "proj.bias"]
