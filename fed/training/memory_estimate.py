"""The memory that training a cohort takes, by a model's configuration, before its weights exist anywhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import plora_kernels as pk
from fed.errors import FedError
from fed.models.gradient_checkpointing import recomputing
from fed.training.elementwise import computing_again
from fed.training.memory import SavedTensors, state_bytes, tensor_bytes
from fed.training.token_losses import SLICE_BYTES

if TYPE_CHECKING:
    from fed.config.training import TrainConfig

# Bytes of a quantised weight's element with its scales: NF4 has 4 bits and an fp32 scale for 64 elements, int8 has one
# for each row, which is next to nothing.
QUANTIZED_BYTES = {"nf4": 0.5 + 4 / 64, "int8": 1.0}


class CohortMemory(NamedTuple):
    """The bytes that a cohort's step takes: the base, all clients' modules and the largest forward.

    `adapter_bytes` are factors, gradients and optimiser states; `activation_bytes` what the forward saves for the
    backward. `buffer_bytes` are the largest tensors beside these: a slice of logits with its logarithms, or a weight
    that is dequantised and the activations of one layer that gradient checkpointing computes again. The allocator's
    overhead is not counted: on a CPU, with blocks that glibc keeps, peaks without the base were 1.56 to 1.64 times the
    estimate's, and 2.9 times with gradient checkpointing.
    """

    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    buffer_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes in all."""
        return sum(self)


def cohort_memory(
    model: nn.Module,
    adapter: pk.PLoRAConfig,
    settings: TrainConfig,
    clients: int,
    length: int,
    answer: int | None = None,
    quantize: str = "none",
    device_type: str = "cpu",
) -> CohortMemory:
    """Return the memory of training `clients` clients at once, with batches of texts of `length` tokens each.

    `model` is a causal language model on the meta device, without an adapter, in the dtype that it will have; one is
    injected into it. `answer` is how many of a text's tokens are its answer (None: all). With `quantize` ("nf4" or
    "int8") the adapted layers' weights count as such. `device_type` is where it is to run, whose slices of logits
    differ in size. Nothing of the model's size is allocated. Raises FedError for a model that is not on the meta
    device.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes))
    >>> from fed.config.training import TrainConfig
    >>> cohort_memory(model, pk.PLoRAConfig(rank=4), TrainConfig(batch_size=2), clients=3, length=16).base_bytes
    791872
    """
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise FedError(f"{type(model).__name__} holds weights; a memory estimate needs it on the meta device")
    base = tensor_bytes([*model.parameters(), *model.buffers()])
    handle = pk.inject(model, adapter)
    layers, samples = [*handle.layers.values()], clients * settings.batch_size
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    numbers, width = sum(map(Tensor.numel, factors)), factors[0].element_size()
    trained = clients * (2 * numbers * width + state_bytes(settings, numbers, len(factors), width))
    largest = 0
    if quantize != "none":
        weights = [layer.in_features * layer.out_features for layer in layers]
        itemsize = layers[0].weight.element_size()
        base -= round(sum(weights) * (itemsize - QUANTIZED_BYTES[quantize]))
        largest = max(weights) * itemsize
    saved, hidden = _forward(model, samples, length, computing_again())
    again = 0
    if settings.gradient_checkpointing:
        # A layer that is computed again keeps everything for its own backward.
        everything, _ = _forward(model, samples, length, nullcontext())
        again = everything // model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        with recomputing(model, True):
            saved, _ = _forward(model, samples, length, computing_again())
    tokens = samples * min(length, length if answer is None else answer)
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    logits = 2 * min(SLICE_BYTES[device_type], tokens * vocabulary * 4)
    handle.restore()
    # The hidden states of counted tokens and their gradient are kept until the backward.
    kept = 2 * tokens * hidden
    return CohortMemory(base, trained, saved + kept, max(logits, largest + again))


def _forward(model: nn.Module, samples: int, length: int, saving: AbstractContextManager[None]) -> tuple[int, int]:
    """Return the bytes that the decoder's forward saves for its backward, and those of a token's hidden state."""
    with FakeTensorMode():  # tensors without memory on the CPU, whose attention is that of a real run
        own = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        saved = SavedTensors(nn.Module(), own.values())
        model.train()
        tokens = torch.zeros(samples, length, dtype=torch.int64)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        with saved.watching(True), saving:
            hidden = torch.func.functional_call(_Decoder(model), {f"model.{name}": own[name] for name in own}, inputs)
    return saved.size_bytes, hidden.shape[-1] * hidden.element_size()


class _Decoder(nn.Module):
    """A causal language model without its output layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the last hidden states, (b, L, H)."""
        hidden: Tensor = self.model.get_decoder()(**inputs).last_hidden_state  # type: ignore[operator]
        return hidden
