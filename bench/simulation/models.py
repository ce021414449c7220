"""The models of the cases: transformers' configurations with random weights from a seed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from bench.simulation.cases import ModelShape

# The module that is trained in full, by family; of a language model none is.
HEADS = {"vit": "classifier", "bert": "classifier", "llama": "score", "llama-lm": None, "gpt2": None}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@functools.lru_cache(maxsize=1)
def build_model(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model with frozen, drawn weights and no dropout of its own, in training mode.

    The next case of the same shape gets the same model, because nothing changes it.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = _drawn(shape)
    return model.to(dtype).requires_grad_(False).train()


def adapted_names(model: nn.Module, head: str | None) -> tuple[str, ...]:
    """Return the names of the linear layers that get an adapter: all but the head, or a language model's output."""
    left_out = head or "lm_head"
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != left_out)


def sharing_weights(model: nn.Module, apart: Sequence[str]) -> nn.Module:
    """Return a copy of a model that shares its weights, but for those of the modules `apart`."""
    own = {id(parameter) for name in apart for parameter in model.get_submodule(name).parameters()}
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if id(tensor) not in own})


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return a transformer's layers."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def first_block(model: nn.Module) -> nn.Module:
    """Return the first of a transformer's layers."""
    return layers_of(model)[0]


def _drawn(shape: ModelShape) -> Any:
    sizes = {
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
        "num_labels": shape.labels,
        "attn_implementation": "sdpa",
    }
    match shape.family:
        case "vit":
            patches = {"image_size": 8, "patch_size": 2, "num_channels": 1, "initializer_range": 0.1}
            return ViTForImageClassification(ViTConfig(**patches, **NO_DROPOUT, **sizes))
        case "bert":
            return BertForSequenceClassification(BertConfig(vocab_size=shape.vocabulary, **NO_DROPOUT, **sizes))
        case "llama" | "llama-lm":
            words = {"vocab_size": shape.vocabulary, "pad_token_id": 0, "use_cache": False}
            attention = {"num_key_value_heads": shape.key_heads, "attention_dropout": 0.0}
            if shape.family == "llama":
                return LlamaForSequenceClassification(LlamaConfig(**words, **attention, **sizes))
            del sizes["num_labels"]
            return LlamaForCausalLM(LlamaConfig(**words, **attention, **sizes, tie_word_embeddings=True))
        case "gpt2":
            words = {"vocab_size": shape.vocabulary, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
            no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            del sizes["num_labels"]
            sizes["n_inner"] = sizes.pop("intermediate_size")
            model = GPT2LMHeadModel(GPT2Config(**words, **no_dropout, **sizes))
            # The same loss by its name: transformers finds none for this class, and says so in the log at the first
            # step, which torch.compile cannot trace.
            model.loss_type = "ForCausalLM"
            return model
