"""The base model of a run: the embedded ViT, pretrained on unshifted digits, or a local checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fed.config import RunConfig, quantized_fault
from fed.data.federated_data import FederatedData
from fed.data.labels import match_head, quoted
from fed.data.pretrained import (
    checkpoint_of,
    failing_as,
    load_architecture,
    load_tokenizer,
    quiet,
    saved_label_names,
)
from fed.data.tables import InstructionTable, Split, TextTable
from fed.errors import FedError
from fed.models import reference
from fed.models.checkpoint import Form, Loaded, load_weights, pad_as
from fed.models.devices import find_device, require_dtype
from fed.models.head import draw, head_parameters, hold_in_float32
from fed.seeding import permutation, torch_seed

# A callback for pretraining, called after each step with the number of steps done and the step's loss.
Progress = Callable[[int, float], object]

_WARMUP_FRACTION = 0.1
_PADDING_TOLERANCE = 1e-2  # of the largest logit: rounding is far below it
_CPU = torch.device("cpu")


class Made(NamedTuple):
    """A base model, and the names of the weights that the run drew because its checkpoint lacks them."""

    model: Any
    drawn: frozenset[str] = frozenset()


def build(config: RunConfig, data: FederatedData, on_event: Callable[[str], object] | None = None) -> nn.Module:
    """Return the base model before any pretraining (`make`)."""
    model: nn.Module = make(config, data, on_event).model
    return model


def make(config: RunConfig, data: FederatedData, on_event: Callable[[str], object] | None = None) -> Made:
    """Return the base model before any pretraining, and which of its weights were drawn from the run's seed.

    Without `model.path` it is the embedded ViT with randomly initialised weights, in fp32 on the CPU. Otherwise it is
    the checkpoint at that path, on the run's device and in the form that `[model]` asks for: a causal language model
    for instructions, else a classifier for the labels `data.label_names`. The checkpoint's head is used if it has these
    labels in this order (see `fed.data.labels.match_head`); otherwise a new one is initialised from the run's seed.
    `on_event` receives a line for the user if so, and for other weights that the checkpoint lacks. Raises FedError if
    there is no usable checkpoint, or it cannot be held in this form.
    """
    with quiet():
        if config.model.path is None:
            _require_dtype(config)
            made = Made(embedded_vit(config, data.label_names))
        elif config.data.task == "instruction":
            loaded = _loaded(config, "AutoModelForCausalLM")
            if loaded.missing:  # these weights would be random
                raise FedError(
                    f"model.path is {config.model.path!r}: instructions need a causal language model; "
                    f"the checkpoint has no {sorted(loaded.missing)[0]}"
                )
            made = Made(loaded.model)
        else:
            made = _classifier(config, data, on_event or _discard)
    _check_tokens(config, made.model, data)
    if config.model.attention != "auto":
        _check_attention(config, made.model, data.test)
    if config.data.task == "classification" and config.model.path is not None:
        _check_padding(config, made.model, data.test, on_event or _discard)
    return made


def pretrain(model: nn.Module, rows: Split, config: RunConfig, progress: Progress | None = None) -> None:
    """Train all weights of the model in place, centrally, with AdamW.

    The learning rate rises to `model.pretrain_learning_rate` over a tenth of the steps and then falls, along cosines.
    """
    steps, peak = config.model.pretrain_steps, config.model.pretrain_learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    total = max(steps, 2)
    # The schedule divides by the number of warm-up steps minus one, which the second bound keeps above 0.
    rising = max(_WARMUP_FRACTION, 1.5 / total)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=total, pct_start=rising)
    batches = _batches(len(rows), config)
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad(set_to_none=True)
        loss = model(**rows.batch(next(batches))).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    model.eval()


def _require_dtype(config: RunConfig) -> None:
    """Raise FedError if the run's device does not compute in the dtype that the ViT is converted to."""
    if config.model.dtype not in ("auto", "float32"):
        dtype = getattr(torch, config.model.dtype)
        require_dtype(dtype, find_device(config.device), f"model.dtype is {config.model.dtype!r}")


def convert(model: nn.Module, config: RunConfig) -> None:
    """Convert a pretrained ViT to `model.dtype`, except its head, which is held in fp32."""
    dtype: torch.dtype = getattr(torch, config.model.dtype.replace("auto", "float32"))
    head = {name: value.detach().clone() for name, value in model.named_parameters() if name in head_parameters(model)}
    model.to(dtype)
    hold_in_float32(model)
    with torch.no_grad():
        for name, value in head.items():
            model.get_parameter(name).copy_(value)


def embedded_vit(config: RunConfig, label_names: Sequence[str]) -> Any:
    """Return a ViT for 8×8 grey images, 16 patches of 2×2 and 4 layers of width 64, initialised from the run's seed."""
    from transformers import ViTConfig, ViTForImageClassification

    architecture = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        **_labels(label_names),
    )
    with torch_seed(_CPU, config.seed, "weights"):
        return ViTForImageClassification(architecture)


def _batches(rows: int, config: RunConfig) -> Iterator[Tensor]:
    """Yield the row indices of batches without end, in a new random order each epoch, dropping incomplete batches."""
    size, epoch = min(rows, config.model.pretrain_batch_size), 0
    while True:
        order = torch.from_numpy(permutation(rows, config.seed, "pretrain", epoch))
        yield from order[: rows - rows % size].split(size)
        epoch += 1


def _classifier(config: RunConfig, data: FederatedData, on_event: Callable[[str], object]) -> Made:
    """Return the checkpoint as a classifier for the labels of the data, with its own head if that has these labels."""
    kind = "AutoModelForSequenceClassification"
    # The loss is always cross-entropy: without its type, transformers would take the one of the saved head's task.
    settings = {**_labels(data.label_names), "problem_type": "single_label_classification"}
    loaded = _loaded(config, kind, ignore_mismatched_sizes=True, **settings)
    model, missing, resized = loaded.model, loaded.missing, loaded.resized
    path = f"model.path is {config.model.path!r}"
    in_half = model.dtype.itemsize < 4
    hold_in_float32(model)
    own = head_parameters(model)
    if wrong := sorted(resized.keys() - own):
        raise FedError(f"{path}: the checkpoint does not load: {wrong[0]} {resized[wrong[0]]}")
    if {name for name, _ in model.named_parameters()} - own <= missing:
        raise FedError(f"{path}: the checkpoint does not load: it holds no weight of {type(model).__name__}")
    if lacking := sorted(missing - own):
        on_event(f"{path}: the checkpoint has no {quoted(lacking, 1)}; drawn from the seed")
    fault = _head_fault(config, data, own, missing & own, resized.keys() & own)
    if fault:
        on_event(f"{path}: {fault}; the run starts from a new head")
        # Otherwise all of it is new already, but it should not have the steps of half precision.
        if in_half or not own <= missing | resized.keys():
            draw(model, config.seed)
    return Made(model, frozenset(missing - own | (own if fault else set())))


def _head_fault(config: RunConfig, data: FederatedData, own: set[str], missing: set[str], resized: set[str]) -> str:
    """Return why the checkpoint's head is not one for the labels of the data, or nothing if it is.

    The head has the parameters `own`, of which the checkpoint lacks `missing` and has `resized` in other sizes.
    """
    saved = saved_label_names(config)
    if not saved or missing == own:
        return "the checkpoint has no classification head"
    if match_head(data.label_names, saved, data.source_numbers) != data.label_names:
        return f"the labels of the checkpoint's head are {quoted(saved)}, those of the data {quoted(data.label_names)}"
    if missing or resized:
        return f"the checkpoint's head has no {sorted(missing | resized)[0]} for its {len(saved)} labels"
    return ""


def _loaded(config: RunConfig, kind: str, **settings: Any) -> Loaded:
    """Return the checkpoint as a model of class `kind`; weights that it lacks are drawn from the run's seed."""
    import transformers

    path, tokenizer, form = checkpoint_of(config), load_tokenizer(config), Form.of(config)
    if (refers := reference.read(path, f"model.path is {str(path)!r}, and what it holds")) is not None:
        raise FedError(
            f"model.path is {str(path)!r}: the base of a run, which refers to a checkpoint; {refers.path!r} would be "
            "right"
        )
    what = f"model.path is {str(path)!r}: the checkpoint does not load"
    with failing_as(what):
        architecture = load_architecture(path)  # refused if it names code
    quantized = getattr(architecture, "quantization_config", None) is not None
    if quantized and (fault := quantized_fault(config, f"model.path {str(path)!r} a quantised checkpoint")):
        raise FedError(fault)
    with torch_seed(form.device, config.seed, "weights"):
        loaded = load_weights(getattr(transformers, kind), path, architecture, form, what, **settings)
    pad_as(loaded.model, tokenizer)
    return loaded


def _embeddings_of(model: Any) -> Any:
    """Return the module that makes a model's embeddings of tokens, None for a model of characters, which has none."""
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _check_tokens(config: RunConfig, model: Any, data: FederatedData) -> None:
    """Raise FedError if the data hold a token, padding included, that the model has no embedding of."""
    table = data.test.table
    if isinstance(table, TextTable):
        tokens, padding = table.tokens["input_ids"].values, table.pad
    elif isinstance(table, InstructionTable):
        tokens, padding = table.tokens.values, table.tokenizer.pad_token_id
    else:
        return
    embeddings = _embeddings_of(model)
    if embeddings is None:
        return
    known = len(embeddings.weight)
    largest = max(int(tokens.max()), padding)
    if largest >= known:
        token = load_tokenizer(config).convert_ids_to_tokens(largest)
        raise FedError(
            f"model.path is {config.model.path!r}: its tokenizer makes token {largest} ({token!r}), and the model "
            f"knows {known} tokens; it should be resized to the tokenizer's {largest + 1} or more"
        )


def _check_padding(config: RunConfig, model: Any, split: Split, on_event: Callable[[str], object]) -> None:
    """Say so if a short row's logits depend on a longer row beside it, as in models that do not mask padding.

    Such are those that mix tokens without attention, as FNet, or approximate it, as Nyströmformer. Raises FedError if
    the model takes no rows like these.
    """
    path = f"model.path is {config.model.path!r}"
    lengths = split.lengths(torch.arange(len(split)))
    rows = torch.stack([lengths.argmin(), lengths.argmax()])
    both, alone = ({**_on(model.device, split.batch(some)), "labels": None} for some in (rows, rows[:1]))
    takes = failing_as(f"{path}: the model does not take the rows")
    with takes, torch.no_grad(), torch_seed(_CPU, config.seed, "padding"):
        padded, plain = model(**both).logits[0], model(**alone).logits[0]
    tolerance = max(_PADDING_TOLERANCE, 8 * torch.finfo(model.dtype).eps)
    if (padded - plain).abs().max() > tolerance * plain.abs().max():
        on_event(
            f"{path}: {type(model).__name__} does not mask padding, so that its answer to a row depends on the other "
            "rows of its batch"
        )


def _check_attention(config: RunConfig, model: Any, split: Split) -> None:
    """Raise FedError unless the attention that is asked for computes here, in a step on the shortest row.

    What there is by name may need a compiler, another dtype or device, or no dropout, which is seen only as it runs.
    """
    embeddings = _embeddings_of(model)
    if embeddings is None:
        return
    trained = [value for value in model.parameters() if value.requires_grad]
    buffers = [(value, value.clone()) for value in model.buffers()]
    attached = embeddings.register_forward_hook(lambda module, arguments, out: out.detach().requires_grad_())
    shortest = split.lengths(torch.arange(len(split))).argmin()[None]
    takes = failing_as(f"model.attention is {config.model.attention!r}: the model does not compute with it here")
    try:
        for value in trained:
            value.requires_grad_(False)  # their gradients would take the memory of the whole model
        with takes, torch_seed(model.device, config.seed, "attention"):
            model.train()
            model(**{**_on(model.device, split.batch(shortest)), "labels": None}).logits.sum().backward()
    finally:
        attached.remove()
        model.eval()
        for value in trained:
            value.requires_grad_(True)
        for value, before in buffers:
            value.copy_(before)


def _labels(label_names: Sequence[str]) -> dict[str, Any]:
    names = dict(enumerate(label_names))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def _on(device: torch.device, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in batch.items()}


def _discard(event: str) -> None:
    pass
