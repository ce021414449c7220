"""The base model of a run: the embedded ViT, pretrained on unshifted digits, or a local checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.labels import match_head, quoted
from fed.data.pretrained import (
    checkpoint_of,
    failing_as,
    load_architecture,
    load_tokenizer,
    position_padding,
    quiet,
    saved_label_names,
)
from fed.data.tables import InstructionTable, Split, TextTable
from fed.errors import FedError
from fed.models.saved_files import RENEW, check_dtypes, check_files, check_sizes, write_digests
from fed.seeding import permutation, torch_seed

# A callback for pretraining, called after each step with the number of steps done and the step's loss.
Progress = Callable[[int, float], object]

_WARMUP_FRACTION = 0.1
_PADDING_TOLERANCE = 1e-2  # of the largest logit: rounding is far below it
_CPU = torch.device("cpu")


def build(config: RunConfig, data: FederatedData, on_event: Callable[[str], object] | None = None) -> nn.Module:
    """Return the base model on the CPU, in fp32, before any pretraining.

    Without `model.path` it is the embedded ViT with randomly initialised weights. Otherwise it is the checkpoint at
    that path: a causal language model for instructions, else a classifier for the labels `data.label_names`. The
    checkpoint's head is used if it has these labels in this order (see `fed.data.labels.match_head`); otherwise a new
    one is initialised from the run's seed. `on_event` receives a line for the user if so, and for other weights that
    the checkpoint lacks. Raises FedError if there is no usable checkpoint.
    """
    with quiet():
        if config.model.path is None:
            model: nn.Module = _embedded_vit(config, data)
        elif config.data.task == "instruction":
            model, missing, _ = _loaded(config, "AutoModelForCausalLM")
            if missing:  # these weights would be random
                raise FedError(
                    f"model.path is {config.model.path!r}: instructions need a causal language model; "
                    f"the checkpoint has no {sorted(missing)[0]}"
                )
        else:
            model = _classifier(config, data, on_event or _discard)
    _check_tokens(config, model, data)
    if config.data.task == "classification" and config.model.path is not None:
        _check_padding(config, model, data.test, on_event or _discard)
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
    """Save a base model in transformers' format, with the tokenizer of its checkpoint if it came from one.

    The digests of all files come last, once these are on the disk; `reopen` holds the files against them.
    """
    with quiet():
        if config.model.path is not None:
            load_tokenizer(config).save_pretrained(directory)
        model.save_pretrained(directory)
    write_digests(directory)


def reopen(directory: Path, label_names: tuple[str, ...] = ()) -> nn.Module:
    """Load a base model that `save` wrote, bit for bit, on the CPU, with the saved dtype and labels.

    Raises FedError if a file or a weight is not as it was saved, or if the model's labels are not `label_names`, in
    this order; () allows any. No code in the folder is run.
    """
    what = f"the base model in {str(directory)!r}"
    check_files(directory, what)
    with quiet(), failing_as(f"{what} does not load"):
        architecture = load_architecture(directory)
        kind = _class_of(architecture)
        with torch.device("meta"):  # a model without memory for its weights
            outline = kind(architecture)
    check_sizes(outline, directory, what)
    with quiet(), failing_as(f"{what} does not load"):
        model, report = kind.from_pretrained(
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="auto",
            output_loading_info=True,
        )
    _check_complete(report, what)
    check_dtypes(model, directory, what)
    saved = tuple((architecture.id2label or {}).values())
    if label_names and saved != label_names:
        raise FedError(
            f"{what} has the labels {quoted(saved)}, and the data {quoted(label_names)}; "
            "model.path and data.path should be as they were when it was made"
        )
    return model


def _class_of(architecture: Any) -> Any:
    """Return the class of transformers' models that a configuration names, which takes this configuration."""
    import transformers

    names = architecture.architectures
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    wanted: Any = kind.config_class if is_model else None  # None for PreTrainedModel itself
    if wanted is not None and isinstance(architecture, wanted):
        return kind
    raise FedError(
        f"its config.json has architectures {names!r}; one class of transformers for its model_type is needed"
    )


def _check_complete(report: dict[str, Any], what: str) -> None:
    """Raise FedError, naming a weight, if those in the file are not exactly the model's."""
    for name in sorted(report["missing_keys"]):
        raise FedError(f"{what} is damaged: its file has no {name!r}; {RENEW}")
    for name in sorted(report["unexpected_keys"]):
        raise FedError(f"{what} is damaged: its file has {name!r}, which is not in the model; {RENEW}")


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


def _classifier(config: RunConfig, data: FederatedData, on_event: Callable[[str], object]) -> Any:
    """Return the checkpoint as a classifier for the labels of the data, with its own head if that has these labels."""
    kind = "AutoModelForSequenceClassification"
    # The loss is always cross-entropy: without its type, transformers would take the one of the saved head's task.
    settings = {**_labels(data), "problem_type": "single_label_classification"}
    model, missing, resized = _loaded(config, kind, ignore_mismatched_sizes=True, **settings)
    path = f"model.path is {config.model.path!r}"
    own = {name for head in head_names(model) for name, _ in model.get_submodule(head).named_parameters(prefix=head)}
    if wrong := sorted(resized.keys() - own):
        raise FedError(f"{path}: the checkpoint does not load: {wrong[0]} {resized[wrong[0]]}")
    if {name for name, _ in model.named_parameters()} - own <= missing:
        raise FedError(f"{path}: the checkpoint does not load: it holds no weight of {type(model).__name__}")
    if lacking := sorted(missing - own):
        on_event(f"{path}: the checkpoint has no {quoted(lacking, 1)}; drawn from the seed")
    if fault := _head_fault(config, data, own, missing & own, resized.keys() & own):
        on_event(f"{path}: {fault}; the run starts from a new head")
        if not own <= missing | resized.keys():  # otherwise all of it is new already
            _draw_head(model, config)
    return model


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


def _draw_head(model: Any, config: RunConfig) -> None:
    """Initialise the whole head from the run's seed, as the model's class initialises a new one."""
    with torch_seed(_CPU, config.seed, "head"):
        for name in head_names(model):
            # A module may initialise its children in another way than they would themselves, so it comes after them.
            for module in reversed([*model.get_submodule(name).modules()]):
                for parameter in module.parameters(recurse=False):
                    parameter._is_hf_initialized = False  # transformers marks what it has loaded, and leaves it alone
                model._init_weights(module)


def _loaded(config: RunConfig, kind: str, **settings: Any) -> tuple[Any, set[str], dict[str, str]]:
    """Return the checkpoint as a model of class `kind`, the weights it lacks, and those that it has in other sizes.

    Both are initialised from the run's seed. The sizes are given as text.
    """
    import transformers

    path, tokenizer = checkpoint_of(config), load_tokenizer(config)
    loads = failing_as(f"model.path is {str(path)!r}: the checkpoint does not load")
    with loads, torch_seed(_CPU, config.seed, "weights"):
        load_architecture(path)  # refused if it names code
        model, report = getattr(transformers, kind).from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **settings,
        )
    _pad_as(model, tokenizer)
    resized = {name: f"is {tuple(saved)}, not {tuple(wanted)}" for name, saved, wanted in report["mismatched_keys"]}
    return model, set(report["missing_keys"]), resized


def _pad_as(model: Any, tokenizer: Any) -> None:
    """Make the tokenizer's padding token the model's, for decoders take the last token that is no padding.

    A model that numbers positions from its padding token on keeps its own, or the positions would be others once it is
    saved and loaded; it needs the attention mask alone.
    """
    if position_padding(model) is not None:
        return
    for settings in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if settings is not None:
            settings.pad_token_id = tokenizer.pad_token_id


def _check_tokens(config: RunConfig, model: Any, data: FederatedData) -> None:
    """Raise FedError if the data hold a token, padding included, that the model has no embedding of."""
    table = data.test.table
    if isinstance(table, TextTable):
        tokens, padding = table.tokens["input_ids"].values, table.pad
    elif isinstance(table, InstructionTable):
        tokens, padding = table.tokens.values, table.tokenizer.pad_token_id
    else:
        return
    try:
        known = len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError):  # a model of characters, which has no table of tokens
        return
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
    both, alone = ({**split.batch(some), "labels": None} for some in (rows, rows[:1]))
    takes = failing_as(f"{path}: the model does not take the rows")
    with takes, torch.no_grad(), torch_seed(_CPU, config.seed, "padding"):
        padded, plain = model(**both).logits[0], model(**alone).logits[0]
    if (padded - plain).abs().max() > _PADDING_TOLERANCE * plain.abs().max():
        on_event(
            f"{path}: {type(model).__name__} does not mask padding, so that its answer to a row depends on the other "
            "rows of its batch"
        )


def _labels(data: FederatedData) -> dict[str, Any]:
    names = dict(enumerate(data.label_names))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def _discard(event: str) -> None:
    pass
