"""Whole models with LoRA on stacked experts, fused: PEFT's logits, gradients, losses, tokens and files."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from tests.support.equality import assert_equal
from tests.support.experts import (
    BOTH,
    FUSED_ONCE,
    MODELS,
    adapt_experts,
    assert_as_exact,
    calls_of,
    fuse,
    tiny_model,
    unfuse,
    wrappers_of,
)

TOKENS = torch.tensor([[5, 9, 20, 33, 7, 61, 12, 9], [8, 6, 58, 41, 30, 11, 62, 0]])


# ------------------------------------------------------------------------------------------------------ whole models


def gradients(model: nn.Module, tokens: Tensor = TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of all that trains, of a language model's own loss."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_give_peft_s_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    # In half precision one layer: what a second one routes could depend on the rounding of the first.
    model = adapt_experts(tiny_model(name, 2 if dtype is torch.float32 else 1, dtype))
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")
    exact, plain = gradients(exact_model), gradients(model)
    fuse(model)
    found = gradients(model)
    assert found[1].keys() == plain[1].keys()
    assert_as_exact(*([logits, *grads.values()] for logits, grads in (found, plain, exact)), dtype)
    assert calls_of(model) == FUSED_ONCE * (2 if dtype is torch.float32 else 1)
    assert found[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_training_gives_the_same_losses(name: str) -> None:
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = adapt_experts(tiny_model(name)).train()
        if fused:
            fuse(model)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
        steps = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][9] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert calls_of(model) == [{"fused": 10}] * 2


@pytest.mark.parametrize("name", list(MODELS))
def test_generation_gives_the_same_tokens(name: str) -> None:
    model = adapt_experts(tiny_model(name))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=TOKENS, **options)
    fuse(model)
    assert_equal(model.generate(input_ids=TOKENS, **options), expected)
    assert all(set(calls) == {"fused"} for calls in calls_of(model))


def test_attention_may_have_adapters_too_and_nothing_need_be_recorded() -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], target_parameters=[f"experts.{name}" for name in BOTH],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model("olmoe"), config)
    expected = gradients(model)
    fuse(model)
    found = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            torch.testing.assert_close(model(input_ids=TOKENS).logits, found[0])
    assert calls_of(model) == [{"fused": 3}] * 2


def test_checkpointing_computes_again_what_it_computed() -> None:
    model = adapt_experts(tiny_model("qwen3_moe")).train()
    fuse(model)
    logits, expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, found = gradients(model)
    assert_equal((again, found), (logits, expected))
    assert calls_of(model) == [{"fused": 3}] * 2


# ------------------------------------------------------------------------------------------- adapters and their files


def test_files_are_peft_s(tmp_path: Path) -> None:
    model = adapt_experts(tiny_model("mixtral"))
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "fused")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    expected = model(input_ids=TOKENS).logits
    base = model.unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "fused").eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected)
    fuse(loaded)
    assert_equal(loaded(input_ids=TOKENS).logits, expected)


def test_adapters_are_added_switched_and_merged_as_in_peft() -> None:
    model = adapt_experts(tiny_model("mixtral"))
    first = model(input_ids=TOKENS).logits
    fuse(model)
    wrapped = len(wrappers_of(model))
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha = 2, 5
    model.add_adapter("other", config)
    assert len(wrappers_of(model)) == wrapped  # none around another
    model.set_adapter("other")
    second = model(input_ids=TOKENS).logits
    assert [set(calls) for calls in calls_of(model)] == [{"fused"}] * 2
    unfuse(model)
    torch.testing.assert_close(second, model(input_ids=TOKENS).logits)
    assert not torch.allclose(first, second)
    fuse(model)
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, first)
    merged = model.merge_and_unload()
    assert not wrappers_of(merged)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, first)
