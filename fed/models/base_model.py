"""The base model of a run: the embedded ViT, pretrained on unshifted digits, or a local checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.pretrained import checkpoint_of, failing_as, load_tokenizer, quiet
from fed.data.tables import Split
from fed.errors import FedError
from fed.seeding import permutation, torch_seed

# A callback for pretraining, called after each step with the number of steps done and the step's loss.
Progress = Callable[[int, float], object]

_WARMUP_FRACTION = 0.1
_CPU = torch.device("cpu")


def build(config: RunConfig, data: FederatedData) -> nn.Module:
    """Return the base model on the CPU, in fp32, before any pretraining.

    Without `model.path` it is the embedded ViT with randomly initialised weights. Otherwise it is the checkpoint at
    that path: a causal language model for instructions, else a classifier for the labels `data.label_names`. Raises
    FedError if there is no usable checkpoint.
    """
    with quiet():
        if config.model.path is None:
            model: nn.Module = _embedded_vit(config, data)
        elif config.data.task == "instruction":
            model, missing = _loaded(config, "AutoModelForCausalLM")
            if missing:  # these weights would be random
                raise FedError(
                    f"model.path is {config.model.path!r}: instructions need a causal language model; "
                    f"the checkpoint has no {sorted(missing)[0]}"
                )
        else:  # with a new head if the checkpoint's own has another number of labels
            kind = "AutoModelForSequenceClassification"
            model, _ = _loaded(config, kind, ignore_mismatched_sizes=True, **_labels(data))
    return model


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


def save(model: Any, config: RunConfig, directory: Path) -> None:
    """Save a base model in transformers' format, with the tokenizer of its checkpoint if it came from one."""
    with quiet():
        if config.model.path is not None:
            load_tokenizer(config).save_pretrained(directory)
        model.save_pretrained(directory)


def reopen(directory: Path) -> nn.Module:
    """Load a base model that `save` wrote, bit for bit, on the CPU, with the saved dtype and labels."""
    import transformers

    with quiet(), failing_as(f"the base model in {str(directory)!r} does not load"):
        architecture = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        kind = getattr(transformers, architecture.architectures[0])
        model: nn.Module = kind.from_pretrained(directory, local_files_only=True, dtype="auto")
    return model


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules of the classification head: all children with parameters except the backbone.

    A language model has none, because its output embeddings belong to the frozen base.
    """
    backbone = getattr(model, "base_model_prefix", "")
    output_embeddings = getattr(model, "get_output_embeddings", None)
    to_tokens = output_embeddings() if callable(output_embeddings) else None
    children = ((name, child) for name, child in model.named_children() if name != backbone and child is not to_tokens)
    return tuple(name for name, child in children if any(True for _ in child.parameters()))


def _embedded_vit(config: RunConfig, data: FederatedData) -> Any:
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
        **_labels(data),
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


def _loaded(config: RunConfig, kind: str, **settings: Any) -> tuple[Any, set[str]]:
    """Return the checkpoint as a model of class `kind`, and the weights it lacks, initialised from the run's seed."""
    import transformers

    path, tokenizer = checkpoint_of(config), load_tokenizer(config)
    loads = failing_as(f"model.path is {str(path)!r}: the checkpoint does not load")
    with loads, torch_seed(_CPU, config.seed, "weights"):
        model, report = getattr(transformers, kind).from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True, **settings
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, set(report["missing_keys"])


def _labels(data: FederatedData) -> dict[str, Any]:
    names = dict(enumerate(data.label_names))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}
