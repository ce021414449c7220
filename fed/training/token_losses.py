"""The losses of a causal language model's tokens, without the logits of positions whose label does not count."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from fed.data.tables import IGNORED, InstructionTable, Table
from fed.training.elementwise import computing_again

# The bytes of a slice's logits in fp32: few enough to be small beside a model, enough for fast products.
SLICE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
LARGEST_PROBE = 50.0  # the size of the logits at which the change that a model makes to its head's output is found
# Roundings by which logits of the same products may differ; a scale or a cap shows as thousands in fp32.
ROUNDINGS = 8
_NUMBERS = ("logit", "lm_head", "output_multiplier", "cap")  # in names of settings that may change logits


class LogitChange(NamedTuple):
    """What a model makes of its output layer's result z: `scale`·z, or cap·tanh(`scale`·z/cap) with a `cap` above 0."""

    scale: float = 1.0
    cap: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """Return the logits, of z's shape and dtype."""
        scaled = z if self.scale == 1 else z * self.scale
        return self.cap * torch.tanh(scaled / self.cap) if self.cap else scaled

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logits / d z, given the logits."""
        return self.scale * (1 - (logits / self.cap).square()) if self.cap else self.scale


class Structure(NamedTuple):
    """How logits come from a model's decoder: what changes the output layer's result, and the decoder's arguments."""

    change: LogitChange
    arguments: Mapping[str, bool]


# The structure of each model that was looked at; None stands for one that is not known.
_structures: WeakKeyDictionary[nn.Module, Structure | None] = WeakKeyDictionary()


def token_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, counted: Tensor) -> Tensor:
    """Return the cross-entropy of each counted token in nats, (T,): fp32, or fp64 for an fp64 model.

    labels: (b, L) int64, the token at every position.  counted: (T,) int64 on the CPU, ascending: the numbers row·L +
    column of the positions whose next token counts. The model's decoder runs over all positions and its output layer
    over the counted ones only, a slice of them at a time; their gradient by the hidden states is made in the forward,
    so that nothing of the size of all logits is kept. An output layer that is trained or adapted runs over slices of
    columns, which the backward computes again. A model whose logits are not found to be a scaled and capped product of
    the decoder's result with the output layer runs as it is, with all logits.
    """
    structure = find_structure(model, inputs)
    output: Any = model.get_output_embeddings() if structure else None  # type: ignore[operator]
    if structure is None or (model.training and _drops(output)):  # dropout numbers the rows of a whole batch
        return _of_all_logits(model, inputs, labels, counted)
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    arguments = {**inputs, **structure.arguments}
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the compiler itself finds what to compute again
        hidden: Tensor = decoder(**arguments).last_hidden_state  # (b, L, H)
    else:
        with computing_again():
            hidden = decoder(**arguments).last_hidden_state
    return _of_hidden(hidden, output, labels, counted, structure.change)


def counted_positions(labels: Tensor) -> Tensor:
    """Return the numbers row·L + column of the positions whose next label in (b, L) is not IGNORED, (T,) on the CPU.

    This waits for the device that the labels are on; `fed.data.tables.Table.counted` knows them without.
    """
    follows = torch.cat([labels[:, 1:] != IGNORED, torch.zeros_like(labels[:, :1], dtype=torch.bool)], dim=1)
    return follows.flatten().nonzero()[:, 0].cpu()


@torch.compiler.disable
def _of_hidden(hidden: Tensor, output: nn.Module, labels: Tensor, counted: Tensor, change: LogitChange) -> Tensor:
    """Return the losses (T,) of the decoder's last hidden states (b, L, H)."""
    if not counts_alone(output):
        return _by_columns(hidden, output, labels, counted, change)
    places = counted.to(hidden.device, non_blocking=True)
    rows, wanted = hidden.flatten(0, 1).index_select(0, places), labels.flatten().index_select(0, places + 1)
    trains = hidden.requires_grad and torch.is_grad_enabled()
    losses: Tensor = _SlicedLoss.apply(rows, output.weight, output.bias, wanted, change, trains)
    return losses


class _SlicedLoss(torch.autograd.Function):
    """Cross-entropy of softmax(change(h Wᵀ + b)), which keeps its gradient by h (T, H) and no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, change: LogitChange, train: bool
    ) -> Tensor:
        wide = torch.float64 if hidden.dtype is torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        gradient = torch.empty_like(hidden) if train else None
        for rows in _slices(len(hidden), weight.shape[0], hidden.device):
            logits = change(nn.functional.linear(hidden[rows], weight, bias).to(wide))  # (t, V)
            targets = labels[rows, None]
            logs = torch.log_softmax(logits, dim=-1)
            losses[rows] = -logs.gather(1, targets)[:, 0]
            if gradient is None:
                continue
            slope = change.slope(logits)
            d_logits = logs.exp_()
            d_logits.scatter_add_(1, targets, -torch.ones_like(targets, dtype=wide))
            if not isinstance(slope, float) or slope != 1:
                d_logits *= slope
            torch.mm(d_logits.to(weight.dtype), weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * d_losses[:, None]).to(gradient.dtype), None, None, None, None, None


def _by_columns(hidden: Tensor, output: nn.Module, labels: Tensor, counted: Tensor, change: LogitChange) -> Tensor:
    """Return the losses (T,) of an output layer that is trained or adapted, from hidden states (b, L, H).

    Every slice has all samples of the batch, because an adapted layer may have modules for groups of them.
    """
    samples, length = labels.shape
    size = _vocabulary(output) * samples
    first = int((counted % length).min()) if len(counted) else 0
    following = torch.cat([labels[:, 1:], labels[:, :1]], dim=1)
    parts = []
    for columns in _slices(length - first, size, hidden.device):
        own = slice(first + columns.start, first + columns.stop)
        parts.append(
            checkpoint(
                _column_losses, hidden[:, own], output, following[:, own], change,
                use_reentrant=False, preserve_rng_state=False,
            )
        )  # fmt: skip
    losses = torch.cat(parts, dim=1)  # (b, L - first)
    places = counted - first * (counted // length + 1)
    return losses.flatten().index_select(0, places.to(losses.device, non_blocking=True))


def _column_losses(hidden: Tensor, output: nn.Module, labels: Tensor, change: LogitChange) -> Tensor:
    logits = change(_wide(output(hidden)))
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none").view_as(labels)


def _of_all_logits(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, counted: Tensor) -> Tensor:
    """Return the losses (T,) from the model's own logits."""
    logits: Tensor = model(**inputs).logits
    places = counted.to(logits.device, non_blocking=True)
    rows, wanted = logits.flatten(0, 1).index_select(0, places), labels.flatten().index_select(0, places + 1)
    return cross_entropy(_wide(rows), wanted, reduction="none")


def slice_bytes(model: nn.Module, table: Table, samples: int) -> int:
    """Return the most bytes that the logits of a slice take at a time: themselves and their logarithms, in fp32.

    They are those of a batch of `samples` rows of the table, with the longest answers, if it has fewer than a slice may
    have. It is 0 for rows of one label.
    """
    if not isinstance(table, InstructionTable):
        return 0
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    tokens = table.lengths(torch.arange(len(table)))
    if counts_alone(output):
        tokens = tokens - table.prompt_lengths.clamp(min=1)
    device = table.device.type
    most = samples * max(0, int(tokens.max())) * _vocabulary(output) * 4
    return 2 * min(most, SLICE_BYTES.get(device, SLICE_BYTES["cuda"]))


def _slices(count: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of `count` rows of `width` logits each, of nearly equal sizes within SLICE_BYTES."""
    most = max(1, SLICE_BYTES.get(device.type, SLICE_BYTES["cuda"]) // (4 * width))
    number = -(-count // most)
    for index in range(number):
        yield slice(count * index // number, count * (index + 1) // number)


def _uncached(module: nn.Module) -> dict[str, bool]:
    """Return the argument by which a model keeps no keys and values, if it has one: training needs none."""
    return {"use_cache": False} if "use_cache" in inspect.signature(module.forward).parameters else {}


def counts_alone(output: nn.Module) -> bool:
    """Return whether an output layer is neither trained nor adapted, so that it may run over any tokens."""
    if type(output) is not nn.Linear or type(output.weight) is not nn.Parameter:  # not a quantised weight
        return False
    return output.weight.is_floating_point() and not any(own.requires_grad for own in output.parameters())


@torch.compiler.disable
def find_structure(model: nn.Module, inputs: Mapping[str, Tensor]) -> Structure | None:
    """Return a model's structure, found once for each model; None if it is not known."""
    if model not in _structures:
        change = find_change(model, inputs)
        known: Any = model
        _structures[model] = None if change is None else Structure(change, _uncached(known.get_decoder()))
    return _structures[model]


def find_change(model: nn.Module, inputs: Mapping[str, Tensor]) -> LogitChange | None:
    """Return the change by which output layer and decoder give the model's own logits; None if there is none.

    The model runs once over the first token of each row, with its decoder's result scaled up so that a cap shows, and
    its logits are compared with those by every scale and cap that its configuration names.
    """
    if not callable(getattr(model, "get_decoder", None)) or not callable(getattr(model, "get_output_embeddings", None)):
        return None
    found: Any = model
    decoder, output = found.get_decoder(), found.get_output_embeddings()
    if decoder is None or decoder is model or not callable(output):
        return None
    begun = {name: value[:, :1] for name, value in inputs.items()}
    seen: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        hidden = getattr(decoder(**begun, **_uncached(decoder)), "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            return None
        z = _wide(output(hidden))
        factor = LARGEST_PROBE / max(float(z.abs().max()), 1e-6)

        def scale_up(module: nn.Module, arguments: Any, result: Any) -> Any:
            seen.append(result.last_hidden_state)
            result.last_hidden_state = result.last_hidden_state * factor
            return result

        hook = decoder.register_forward_hook(scale_up)
        try:
            logits = _wide(model(**begun, **_uncached(model)).logits)
        finally:
            hook.remove()
        if len(seen) != 1 or not torch.equal(seen[0], hidden):
            return None
        z = _wide(output(hidden * factor))
    if z.shape != logits.shape or not z.isfinite().all():
        return None
    bound = ROUNDINGS * torch.finfo(hidden.dtype).eps
    errors = {change: float((change(z) - logits).abs().max() / logits.abs().max()) for change in _candidates(model)}
    best = min(errors, key=lambda change: errors[change])
    return best if errors[best] <= bound else None


def _candidates(model: Any) -> list[LogitChange]:
    """Return the changes that the numbers in a model's configuration may stand for, the identity first."""
    settings = model.config.get_text_config()
    values = {
        float(value)
        for name, value in vars(settings).items()
        if isinstance(value, int | float) and value > 0 and any(part in name for part in _NUMBERS)
    }
    scales = dict.fromkeys([1.0, *sorted(values), *(1 / value for value in sorted(values))])
    return [LogitChange(scale, cap) for cap, scale in product([0.0, *sorted(values)], scales)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in evaluation mode, in which it draws no random numbers."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _drops(module: nn.Module) -> bool:
    """Return whether an adapted layer has LoRA dropout."""
    return bool(getattr(module, "dropout", 0.0))


def _vocabulary(output: nn.Module) -> int:
    weight = getattr(output, "weight", None)
    return int(getattr(output, "out_features", 0) or (1 if weight is None else weight.shape[0]))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
