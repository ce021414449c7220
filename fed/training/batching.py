"""Dividing a step's batch of texts, so that little of what is computed is padding: by length, or packed in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from fed.data.tables import DenseTable, InstructionTable, Table
from fed.errors import FedError
from fed.training.token_losses import counts_alone, evaluating, find_structure

if TYPE_CHECKING:
    from fed.config.training import TrainConfig

# "packed-by-client" has one sequence for each client, "packed" one for all of them.
Way = Literal["padded", "bucketed", "packed", "packed-by-client"]
# What one more part of a batch costs, in tokens: on a CPU the weights are read again, on a GPU kernels are launched.
PART_TOKENS = {"cpu": 64, "cuda": 4096}
# Roundings by which a row's hidden states may differ if it is packed; where rows mix, they are others altogether.
ROUNDINGS = 1000


class Packing(NamedTuple):
    """Whether a model keeps rows of one sequence apart, and whether it does if one of them is not finite."""

    finite: bool
    any_values: bool


# What was found for each model that was tried.
_packs: WeakKeyDictionary[nn.Module, Packing] = WeakKeyDictionary()


class Part(NamedTuple):
    """A part of a step's batch that runs in one forward and backward.

    `batch` and `counted` are as `fed.training.losses.client_losses` takes them. `sizes` is the number of samples of
    each client, or of tokens if they are packed, and `shares` (C,) fp64 its part of the labels that count in its batch;
    None: all. `numbers` are the rows' numbers for LoRA dropout, (rows,) int64, if not those of a whole padded batch.
    `positions` is the number of tokens computed for each client, padding included.
    """

    batch: dict[str, Tensor]
    counted: Tensor | None
    sizes: list[int]
    shares: Tensor | None
    numbers: Tensor | None
    positions: list[int]


def find_way(settings: TrainConfig, model: nn.Module, table: Table, whole: bool = False) -> Way:
    """Return how batches are divided: as `train.batching` says, or for "auto" what is fastest.

    That is packing where attention of packed rows costs nothing, as in flash attention on a GPU, and else buckets. With
    `whole` a batch must stay as it is: compiled steps need one shape, and LoRA dropout numbers the rows of a padded
    batch. Rows without tokens have no padding. Raises FedError if rows of this table or model cannot be packed.
    """
    asked = settings.batching
    if whole or asked == "padded" or isinstance(table, DenseTable):
        return "padded"
    if asked == "bucketed":
        return "bucketed"
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if asked == "auto" and not (table.device.type == "cuda" and "flash" in attention):
        return "bucketed"
    if isinstance(table, InstructionTable) and can_pack(model, table):
        return "packed"
    if asked == "auto":
        return "bucketed"
    why = "texts to classify"
    if isinstance(table, InstructionTable):
        why = f"{type(model).__name__}, which mixes them or has a trained output layer,"
    raise FedError(
        f"train.batching is 'packed': {why} cannot take rows in one sequence; 'bucketed' or 'auto' would be right"
    )


def divide(table: Table, rows: Sequence[Tensor], way: Way) -> list[Part]:
    """Return the parts of a batch of which client c has the table's rows `rows[c]`; all rows are in one of them."""
    whole = torch.cat(list(rows))
    lengths = table.lengths(whole)
    clients = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(own) for own in rows]))
    if way == "packed":
        return [_packed(table, whole, lengths, clients, len(rows))]
    if way == "packed-by-client":
        places_of = [(clients == client).nonzero()[:, 0] for client in range(len(rows))]
        return [
            _packed(table, whole[own], lengths[own], clients[own], len(rows))._replace(shares=shares)
            for own, shares in zip(places_of, torch.eye(len(rows), dtype=torch.float64), strict=True)
        ]
    parts = buckets(lengths, PART_TOKENS.get(table.device.type, PART_TOKENS["cuda"])) if way == "bucketed" else []
    if len(parts) < 2:
        return [_padded(table, whole, lengths, clients, len(rows))]
    counted = (
        torch.ones(len(whole), dtype=torch.float64) if (one := table.counted(whole)) is None else _by_row(one, lengths)
    )
    totals = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, clients, counted).clamp_min(1)
    within = torch.cat([torch.arange(len(own)) for own in rows])  # a row's number among its client's
    longest = torch.tensor([int(table.lengths(own).max()) for own in rows])
    found = []
    for places in parts:
        part = _padded(table, whole[places], lengths[places], clients[places], len(rows))
        shares = torch.zeros_like(totals).index_add_(0, clients[places], counted[places]) / totals
        firsts = within[places] * longest[clients[places]]
        numbers = (firsts[:, None] + torch.arange(int(lengths[places].max()))).flatten()
        found.append(part._replace(shares=shares, numbers=numbers))
    return found


def buckets(lengths: Tensor, part_tokens: int) -> list[Tensor]:
    """Return the places of rows that run together, (n,) int64 ascending, for the least Σ_parts n·longest + part_tokens.

    A part takes the rows of neighbouring lengths.

    >>> [part.tolist() for part in buckets(torch.tensor([5, 90, 6, 100]), 16)]
    [[1, 3], [0, 2]]
    """
    ordered, order = lengths.sort(descending=True, stable=True)
    sizes = ordered.numpy().astype(np.int64)
    count = len(sizes)
    least, begins = np.zeros(count + 1, dtype=np.int64), np.zeros(count + 1, dtype=np.int64)
    for end in range(1, count + 1):  # least[end]: the cost of the first `end` rows, of which a part begins at `begins`
        costs = least[:end] + (end - np.arange(end)) * sizes[:end] + part_tokens
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    found, end = [], count
    while end:
        found.append(order[begins[end] : end].sort().values)
        end = int(begins[end])
    return found[::-1]


def can_pack(model: nn.Module, table: InstructionTable) -> bool:
    """Return whether rows in one sequence, told apart by their positions, have the hidden states that they have alone.

    It is tried once for each model, with two rows, and outside of any groups. The output layer must be neither trained
    nor adapted, because it runs over all clients' tokens at once.
    """
    known: Any = model
    return _packing(model, table).finite and counts_alone(known.get_output_embeddings())


def way_of_cohort(way: Way, model: nn.Module, table: Table) -> Way:
    """Return how a cohort's batches are divided, given `find_way`'s answer.

    A client that is not finite must touch no other. Attention under a mask multiplies the values of other rows by 0,
    which leaves NaN, so unless the model's attention never reads them, every client has a sequence of its own.
    """
    if way != "packed" or not isinstance(table, InstructionTable) or _packing(model, table).any_values:
        return way
    return "packed-by-client"


def _packing(model: nn.Module, table: InstructionTable) -> Packing:
    if model not in _packs:
        _packs[model] = _tried(model, table)
    return _packs[model]


def _tried(model: Any, table: InstructionTable) -> Packing:
    rows = torch.arange(min(2, len(table))).repeat(2)[:2]
    padded = table.batch(rows)
    del padded["labels"]
    structure = find_structure(model, padded)
    if structure is None:
        return Packing(False, False)
    lengths = table.lengths(rows)
    packed = table.packed(rows)
    del packed["labels"]
    first = int(lengths[0])
    tokens = packed["input_ids"].clone()
    tokens[:, :first] = torch.where(tokens[:, :first] > 0, tokens[:, :first] - 1, 1)  # others, of the same vocabulary

    def states(inputs: dict[str, Tensor]) -> Tensor:
        hidden: Tensor = model.get_decoder()(**inputs, **structure.arguments).last_hidden_state
        return hidden

    def spoil(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        rows = torch.arange(embedded.shape[1], device=embedded.device)[:, None]
        return embedded.masked_fill(rows < first, torch.nan)

    with torch.no_grad(), evaluating(model):
        alone = states(padded)
        try:
            found, other = states(packed)[0], states({**packed, "input_ids": tokens})[0]
            hook = model.get_input_embeddings().register_forward_hook(spoil)
            try:
                spoiled = states(packed)[0]
            finally:
                hook.remove()
        except (TypeError, ValueError, RuntimeError):  # a model that takes no positions
            return Packing(False, False)
    wanted = torch.cat([alone[number, :length] for number, length in enumerate(lengths.tolist())])
    bound = ROUNDINGS * torch.finfo(wanted.dtype).eps * wanted.abs().max()
    is_near = found.shape == wanted.shape and bool(
        (found - wanted).abs().max() <= bound.clamp_max(0.1 * wanted.abs().max())
    )
    # In half precision the bound is wide, so a row's states must not depend on the row before at all.
    apart = is_near and torch.equal(found[first:], other[first:])
    return Packing(apart, apart and torch.equal(found[first:], spoiled[first:]))


def _padded(table: Table, rows: Tensor, lengths: Tensor, clients: Tensor, count: int) -> Part:
    sizes = torch.bincount(clients, minlength=count)
    positions = (sizes * int(lengths.max())).tolist()
    return Part(table.batch(rows), table.counted(rows), sizes.tolist(), None, None, positions)


def _packed(table: Any, rows: Tensor, lengths: Tensor, clients: Tensor, count: int) -> Part:
    sizes = torch.zeros(count, dtype=torch.int64).index_add_(0, clients, lengths)
    longest = torch.zeros(count, dtype=torch.int64).scatter_reduce_(0, clients, lengths, "amax")
    first = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(clients, minlength=count).cumsum(0)[:-1]])
    begins = (torch.arange(len(rows)) - first[clients]) * longest[clients]  # as in the client's own padded batch
    shifts = begins - (lengths.cumsum(0) - lengths)
    numbers = torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)
    tokens = sizes.tolist()
    return Part(table.packed(rows), table.packed_counted(rows), tokens, None, numbers, tokens)


def _by_row(counted: Tensor, lengths: Tensor) -> Tensor:
    """Return the number of counted positions in each row of a padded batch, (b,) fp64."""
    return torch.bincount(counted // int(lengths.max()), minlength=len(lengths)).double()
