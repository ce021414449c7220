"""Mixtures of experts with random weights, tiny models and experts alone, adapted by PEFT's `target_parameters`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import peft
import torch
import transformers as tf
from peft.tuners import lora
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from plora_kernels.nn.fused_peft.experts import FusedParamWrapper

BOTH = ("gate_up_proj", "down_proj")
FUSED_ONCE = [{"fused": 1}]  # `calls_of` a model with one layer of experts after one call
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MANY = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mixtral": lambda **more: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, **more)
    ),
    "qwen2_moe": lambda **more: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**SIZES, **MANY, shared_expert_intermediate_size=20, **more)
    ),
    "qwen3_moe": lambda **more: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **MANY, head_dim=8, **more)),
    "olmoe": lambda **more: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3, pad_token_id=0, **more)
    ),
    "gpt_oss": lambda **more: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **more)
    ),
    "llama4": lambda **more: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **SIZES,
            intermediate_size_mlp=24,
            head_dim=8,
            num_local_experts=4,
            interleave_moe_layer_step=1,
            pad_token_id=0,
            **more,
        )
    ),
}


def tiny_model(name: str, layers: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a tiny model of experts in evaluation mode."""
    return MODELS[name](num_hidden_layers=layers).to(dtype).eval()


def adapt_experts(model: nn.Module, targets: tuple[str, ...] = BOTH, rank: int = 4, **options: Any) -> Any:
    """Return PEFT's model of a model whose experts' parameters of these names have adapters with a random B."""
    config = peft.LoraConfig(
        r=rank, target_modules=[], target_parameters=[f"experts.{name}" for name in targets],
        init_lora_weights=False, **options,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def wrappers_of(model: nn.Module) -> list[lora.ParamWrapper]:
    """Return the wrappers of a model, each before those inside it."""
    return [module for module in model.modules() if isinstance(module, lora.ParamWrapper)]


def fuse(model: nn.Module) -> None:
    """Let all wrappers of a model run fused."""
    for wrapper in wrappers_of(model):
        wrapper.__class__ = FusedParamWrapper


def unfuse(model: nn.Module) -> None:
    """Give all wrappers of a model PEFT's class back."""
    for wrapper in wrappers_of(model):
        wrapper.__class__ = lora.ParamWrapper


def calls_of(model: nn.Module) -> list[dict[str, int]]:
    """Return what the wrappers of a model counted, without those that were never called."""
    return [wrapper._plora_calls for wrapper in wrappers_of(model) if hasattr(wrapper, "_plora_calls")]


# ------------------------------------------------------------------------------------------------- experts alone


class Block(nn.Module):
    """A model that is an experts module alone."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Return what the experts return."""
        y: Tensor = self.experts(*inputs, **named)
        return y


class ExpertsCase(NamedTuple):
    """An experts class: its configuration, the number of experts, and the names of the weights."""

    build: Callable[[Any], nn.Module]
    config: Callable[[], Any]
    number: int
    names: tuple[str, str] = BOTH

    def block(self, implementation: str = "eager", seed: int = 0) -> Block:
        """Return the experts with random weights, in fp32, so that outputs are of order one."""
        config = self.config()
        config._experts_implementation = implementation
        experts = self.build(config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in experts.named_parameters():
            spread = 0.3 if "bias" in name or parameter.dim() == 1 else 30**-0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
            parameter.requires_grad_(False)
        return Block(experts)

    def inputs(self, tokens: int, dtype: torch.dtype, chosen: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
        """Return hidden states (T, H), and the index and weights of each token's experts; two have no tokens."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
        if self.build is Llama4TextExperts:
            return (hidden.repeat(self.number, 1),)
        scores = torch.rand(tokens, self.number, generator=generator)
        scores[:, [0, 3]] = 0.0  # experts without tokens, the first and one in between
        weights, index = scores.topk(chosen)
        return hidden, index, weights.to(dtype)


def _sized(kind: type, **sizes: Any) -> Callable[[], Any]:
    return lambda: kind(hidden_size=32, **sizes)


EXPERTS = {
    "qwen2_moe": ExpertsCase(Qwen2MoeExperts, _sized(tf.Qwen2MoeConfig, moe_intermediate_size=24, num_experts=7), 7),
    "mixtral": ExpertsCase(MixtralExperts, _sized(tf.MixtralConfig, intermediate_size=24, num_local_experts=7), 7),
    "gpt_oss": ExpertsCase(GptOssExperts, _sized(tf.GptOssConfig, intermediate_size=24, num_local_experts=7), 7),
    "nemotron_h": ExpertsCase(
        NemotronHExperts,
        _sized(tf.NemotronHConfig, moe_intermediate_size=24, n_routed_experts=7, moe_latent_size=None),
        7,
        ("up_proj", "down_proj"),
    ),
    "llama4": ExpertsCase(Llama4TextExperts, _sized(tf.Llama4TextConfig, intermediate_size=24, num_local_experts=7), 7),
}
if hasattr(tf, "MuseSparkTextConfig"):  # newer than the transformers of `constraints-device.txt`, as Aria's form is
    from transformers.models.aria.modeling_aria import AriaExperts
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    EXPERTS |= {
        "aria": ExpertsCase(AriaExperts, _sized(tf.AriaTextConfig, intermediate_size=24, moe_num_experts=7), 7),
        "muse_spark": ExpertsCase(
            MuseSparkExperts,
            _sized(
                tf.MuseSparkTextConfig,
                num_attention_heads=4,
                num_key_value_heads=2,
                moe_hidden_size=32,
                moe_intermediate_size=24,
                num_local_experts=7,
            ),
            7,
        ),
    }


def leaves_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield what gradients are taken of: the floating-point inputs, and what the model trains."""
    yield from (tensor for tensor in inputs if tensor.is_floating_point())
    yield from (parameter for parameter in model.parameters() if parameter.requires_grad)


def run_experts(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    """Return the output for these inputs, and the gradients of `leaves_of` for a random output gradient."""
    inputs = tuple(tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
    y = model(*inputs)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves_of(model, inputs)), dy)]


def assert_as_exact(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Assert that errors are at most twice PEFT's at the same dtype, or four spacings of the largest number."""
    for position, (result, unfused, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert result.dtype is unfused.dtype
        floor = 4 * torch.finfo(dtype).eps * truth.abs().max()
        for norm in (2, float("inf")):
            error, allowed = ((one.double() - truth).norm(norm) for one in (result, unfused))
            assert error <= 2 * allowed + floor, (position, norm, error.item(), allowed.item())


def in_double(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the results of PEFT's own forward in float64, by the experts' own loop."""
    exact: Any = copy.deepcopy(model).double()
    unfuse(exact)
    experts = wrappers_of(exact)[0].get_base_layer()
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"
    return run_experts(exact, tuple(one.double() if one.is_floating_point() else one for one in inputs))
