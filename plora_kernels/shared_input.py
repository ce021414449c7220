"""Layers that read the same tensor one after another, such as q, k and v, computed in one launch at the first call.

The model is left as it is: it calls `q_proj(x)`, `k_proj(x)` and `v_proj(x)`. The first of them computes all three and
keeps the others' outputs until they are called with the same tensor. Whatever else happens (another tensor, a change
to x or to a layer, another mode, a layer that is not called) a layer that finds nothing of its own to take runs alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import FusedPLoRALinear
from .ops import _watched
from .projections import Computed, JointGradient, Projection, attach, forward

# Names under which transformers keep linears that read one tensor, as they are called in a parent's forward.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
MISSES_ALLOWED = 3  # rounds in a row in which an output was computed and not taken, before the layers part


def find_siblings(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Return the names, two or more at a time, of linears that seem to share their input.

    They lie under one parent, have names of one entry of `SIBLINGS`, and agree in input size, dtype and device. Whether
    they are called with one tensor shows at run time.
    """
    parents = dict.fromkeys(name.rpartition(".")[0] for name in linears)
    groups = []
    for parent in parents:
        for tails in SIBLINGS:
            names = [name for tail in tails if (name := f"{parent}.{tail}" if parent else tail) in linears]
            alike: dict[object, list[str]] = {}
            for name in names:
                weight = linears[name].weight
                alike.setdefault((weight.shape[1], weight.dtype, weight.device), []).append(name)
            groups += [tuple(group) for group in alike.values() if len(group) > 1]
    return groups


class _State(NamedTuple):
    """What a layer's results depend on besides x: its tensors, what may change about each, and its scale."""

    tensors: tuple[Tensor | None, ...]
    stamps: tuple[tuple[int, int, bool] | None, ...]
    scale: float

    def equals(self, other: _State) -> bool:
        """Say whether nothing changed between the two."""
        same = all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
        return same and self.stamps == other.stamps and self.scale == other.scale


class _Round:
    """One input on its way through the layers: the outputs not taken yet, and the joint gradient of those taken."""

    def __init__(self, x: Tensor, outputs: dict[int, tuple[_State, Computed]]) -> None:
        self._circumstances = _circumstances(x)
        self._outputs = outputs
        self.untaken = set(outputs)
        self.joint = JointGradient(x.shape)
        # Outputs that nobody takes live no longer than x. The callback must not hold the round, which holds it.
        self._x = weakref.ref(x, lambda _: outputs.clear())

    def fits(self, x: Tensor) -> bool:
        """Say whether this is the round's tensor, unchanged, and the modes are the same."""
        return self._x() is x and self._circumstances == _circumstances(x)

    def take(self, place: int, state: _State) -> Computed | None:
        """Return a layer's output, once, or None if it is gone or the layer has changed since."""
        found = self._outputs.pop(place, None)
        if found is None or not found[0].equals(state):
            return None
        self.untaken.remove(place)
        return found[1]

    def drop(self) -> None:
        """Let go of what nobody took."""
        self._outputs.clear()


class SharedInput:
    """The layers of one group, held weakly, and the round they are in."""

    def __init__(self, size: int) -> None:
        self._members: list[weakref.ref[SiblingPLoRALinear] | None] = [None] * size
        self._round: _Round | None = None
        self._misses = 0

    def enter(self, place: int, layer: SiblingPLoRALinear) -> None:
        """Make a layer the member at this place."""
        self._members[place] = weakref.ref(layer)

    def leave_round(self) -> None:
        """Forget outputs that were computed and not taken."""
        if self._round is not None:
            self._round.drop()
            self._round = None

    def compute(self, layer: SiblingPLoRALinear, x: Tensor) -> Tensor | None:
        """Return the layer's y (…, N) out of one launch for the whole group, or None if the layer is to run alone."""
        if not _may_share(x):
            return None
        place, current = layer.place, self._round
        if current is not None and current.untaken and current.fits(x):
            computed = current.take(place, layer.state())
        else:
            if current is not None:
                self._misses = self._misses + 1 if current.untaken else 0
                self.leave_round()
            if self._misses >= MISSES_ALLOWED:
                return None
            current, computed = self._start_round(layer, x)
        if current is None or computed is None:
            return None
        if not current.untaken:
            self._misses, self._round = 0, None
        return attach(x, layer.operands(), computed, current.joint)

    def _start_round(self, layer: SiblingPLoRALinear, x: Tensor) -> tuple[_Round | None, Computed | None]:
        """Compute every member's output of x and return the new round with this layer's; (None, None) if one cannot."""
        members = [reference() if reference is not None else None for reference in self._members]
        present = [member for member in members if member is not None]
        if len(present) < len(members) or layer is not members[layer.place]:
            return None, None
        if any(member.dropout > 0 and member.training for member in present):
            return None, None
        with torch.no_grad():
            operands = [member.operands() for member in present]
        if not all(_fits_together(x, projection) for projection in operands):
            return None, None
        states = [member.state() for member in present]
        keep_s = torch.is_grad_enabled() and any(member.lora_B.requires_grad for member in present)
        computed = forward(x, operands, keep_s)
        self._round = _Round(x, dict(enumerate(zip(states, computed, strict=True))))
        return self._round, self._round.take(layer.place, states[layer.place])

    def __getstate__(self) -> int:
        """Copy and pickle the size alone: the copied layers enter by themselves."""
        return len(self._members)

    def __setstate__(self, size: int) -> None:
        self.__init__(size)  # type: ignore[misc]


class SiblingPLoRALinear(FusedPLoRALinear):
    """A `FusedPLoRALinear` that computes its output together with the layers that read the same tensor.

    Parameters, state dict, selection and results are those of `FusedPLoRALinear`; every layer keeps its own rank,
    scale, bias and selection. Layers run alone inside torch.compile, under an autocast that casts, in inference mode
    (whose tensors count no changes), on tensor subclasses, where a weight is not contiguous, and while one of them
    drops elements of x, each by a mask of its own.
    """

    shared: SharedInput
    place: int

    @staticmethod
    def group(layers: Sequence[SiblingPLoRALinear]) -> None:
        """Make these layers share their input from now on."""
        shared = SharedInput(len(layers))
        for place, layer in enumerate(layers):
            layer.shared, layer.place = shared, place
            shared.enter(place, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, N) for x (…, K)."""
        y = None if torch.compiler.is_compiling() else self.shared.compute(self, x)
        return super().forward(x) if y is None else y

    def operands(self) -> Projection:
        """Return what enters y now: the trained modules of a folded layer, all R of a frozen one."""
        trained = self.selected_index if self._unselected == "frozen" else None
        lora_A, lora_B = (self.lora_A, self.lora_B) if trained is None else self._merged_factors()
        if lora_A.shape[0] == 0:  # nothing is trained: no gradient, as in the layer alone
            lora_A, lora_B = lora_A.detach(), lora_B.detach()
        return Projection(self.weight, lora_A, lora_B, self.bias, self.scale, trained)

    def state(self) -> _State:
        """Return what y depends on besides x, to tell whether it changed."""
        tensors = (self.weight, self.bias, self.lora_A, self.lora_B, self.full_A, self.full_B)
        stamps = tuple(None if t is None else (t._version, t.data_ptr(), t.requires_grad) for t in tensors)
        return _State(tensors, stamps, self.scale)

    def _apply(self, fn: Any, recurse: bool = True) -> SiblingPLoRALinear:
        self.shared.leave_round()
        super()._apply(fn, recurse)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer, which enters the copy of its group."""
        super().__setstate__(state)
        self.shared.enter(self.place, self)


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """Return what must not change while outputs wait: the count of x's changes, the grad mode, the CUDA stream."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return x._version, torch.is_grad_enabled(), stream


def _may_share(x: Tensor) -> bool:
    """Say whether an output computed now would be the same at a later call, and nobody watches what is computed."""
    if x.numel() == 0 or x.is_inference() or _watched(x) or torch._C._are_functorch_transforms_active():
        return False
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return not casts or x.dtype in (torch.float64, torch.get_autocast_dtype(kind))


def _fits_together(x: Tensor, projection: Projection) -> bool:
    """Say whether a projection can enter a joint launch on x; where not, the layer alone says what is wrong."""
    weight, lora_A, lora_B, bias, _, _ = projection
    tensors = [tensor for tensor in (weight, lora_A, lora_B, bias) if tensor is not None]
    return (
        not (weight.requires_grad and torch.is_grad_enabled())
        and x.shape[-1] == weight.shape[1]
        and weight.is_contiguous()
        and not _watched(*tensors)
        and all(tensor.dtype is x.dtype and tensor.device == x.device for tensor in tensors)
        and not any(tensor.is_inference() for tensor in tensors)
    )
