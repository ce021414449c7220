"""Layers that read the same tensor one after another, such as q, k and v, all computed at the first call.

The model is not changed: it calls `q_proj(x)`, `k_proj(x)` and `v_proj(x)`. The first call computes all three outputs
and keeps the other two until their layers are called with the same tensor. If no valid output is kept for a layer
(another tensor, a change to x or to a layer, another grad mode or stream), the group is computed again or the layer
runs alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from plora_kernels.checks import may_adapt
from plora_kernels.dispatch import autocast_dtype, is_watched
from plora_kernels.nn.distributed import refuse_unreduced
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.ops.projections import Computed, JointGradient, Projection, attach, forward

# Names of linears that read the same tensor in common transformers, in the order in which the parent calls them.
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
MISSES_ALLOWED = 3  # after so many rounds in a row with an output that was not taken, the layers run alone for good


def find_siblings(linears: Mapping[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Return groups of two or more names of linears that seem to share their input.

    The linears of a group have the same parent, names of one entry of `SIBLINGS`, and the same input size, dtype and
    device. Whether they are called with the same tensor is only known at run time.
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
    """What a layer's results depend on besides x.

    The marks hold ids and addresses of tensors. The tensors are held as well, so that no new tensor can get the same.
    """

    marks: tuple[float | None, ...]
    tensors: tuple[Tensor | None, ...]


class _Waiting(NamedTuple):
    """A layer's output that was computed but not taken yet, with the layer's state and operands at that time."""

    state: _State
    operands: Projection
    computed: Computed


class _Round:
    """The outputs of all layers of a group for one x: those not taken yet, and the joint gradient of the others."""

    def __init__(self, x: Tensor, waiting: dict[int, _Waiting]) -> None:
        self._circumstances = _circumstances(x)
        self._waiting = waiting
        self.untaken = len(waiting)
        self.joint = JointGradient(x.shape)
        # Outputs that no layer takes are freed together with x. The callback refers to `waiting` and not to the round,
        # because the round holds the weak reference and with it the callback.
        self._x = weakref.ref(x, lambda _: waiting.clear())

    def fits(self, x: Tensor) -> bool:
        """Say whether x is the round's tensor, unchanged, and grad mode and CUDA stream are the same."""
        return self._x() is x and self._circumstances == _circumstances(x)

    def take(self, layer: SiblingPLoRALinear) -> _Waiting | None:
        """Return a layer's output, once, or None if it is gone or the layer has changed since."""
        found = self._waiting.pop(layer.place, None)
        if found is None or found.state.marks != layer.state().marks:
            return None
        self.untaken -= 1
        return found

    def drop(self) -> None:
        """Free the outputs that were not taken."""
        self._waiting.clear()


class SharedInput:
    """The layers of one group, held by weak references, and the current round."""

    def __init__(self, size: int) -> None:
        self._members: list[weakref.ref[SiblingPLoRALinear] | None] = [None] * size
        self._round: _Round | None = None
        self._misses = 0

    def enter(self, place: int, layer: SiblingPLoRALinear) -> None:
        """Make a layer member number `place`."""
        self._members[place] = weakref.ref(layer)

    def leave_round(self) -> int:
        """End the round and free the outputs that were not taken; return how many there were."""
        current, self._round = self._round, None  # in one statement: another thread may begin a round meanwhile
        if current is None:
            return 0
        current.drop()
        return current.untaken

    def compute(self, layer: SiblingPLoRALinear, x: Tensor) -> Tensor | None:
        """Return the layer's y (…, N) from one call for the whole group, or None if the layer has to run alone."""
        member = self._members[layer.place]
        if member is None or member() is not layer or type(layer) is not SiblingPLoRALinear or not _may_share(x):
            return None
        current = self._round
        if current is None or not current.untaken or not current.fits(x):
            current = self._begin(x)
        found = current.take(layer) if current is not None else None
        if current is None or found is None:
            return None
        if not current.untaken:
            self._misses, self._round = 0, None
        # `_begin` ran without a graph, but a frozen layer's factors are merged tensors: they need one for the gradient.
        operands = found.operands if found.operands.trained is None else layer.operands()
        return attach(x, operands, found.computed, current.joint)

    def _begin(self, x: Tensor) -> _Round | None:
        """Compute every member's output of x and return the new round; None if they do not fit together."""
        self._misses += self.leave_round() > 0
        members = [reference() for reference in self._members if reference is not None]
        if self._misses >= MISSES_ALLOWED or len(members) < len(self._members):
            return None
        able = [member for member in members if type(member) is SiblingPLoRALinear and not member.drops]
        with torch.no_grad():
            operands = [member.operands() for member in able]
        if len(able) < len(members) or not _fit_together(x, operands):
            return None
        computed = forward(x, operands, keep_s=torch.is_grad_enabled())
        states = (member.state() for member in able)
        # Kept for the layers that are called next. The caller uses the returned round, because another thread may
        # replace `self._round`.
        self._round = begun = _Round(x, dict(enumerate(map(_Waiting, states, operands, computed))))
        return begun

    def __getstate__(self) -> int:
        """Copy and pickle the number of members only: the copied layers enter again by `__setstate__`."""
        return len(self._members)

    def __setstate__(self, size: int) -> None:
        self.__init__(size)  # type: ignore[misc]


class SiblingPLoRALinear(FusedPLoRALinear):
    """A `FusedPLoRALinear` that computes its output together with the layers that read the same tensor.

    Parameters, state dict, selection and results are those of `FusedPLoRALinear`; every layer keeps its own rank,
    scale, bias and selection. Layers run alone inside torch.compile, under an autocast that casts, in inference mode
    (whose tensors have no version counter), on tensor subclasses, if a weight is not contiguous, while one of them uses
    dropout, because each has its own mask, and while they run groups (`Injected.grouped`) or are disabled.
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
        alone = torch.compiler.is_compiling() or self.groups is not None or self.disabled
        if not alone:
            refuse_unreduced(self.lora_A, self.lora_B)
        y = None if alone else self.shared.compute(self, x)
        return super().forward(x) if y is None else y

    @property
    def drops(self) -> bool:
        """Whether dropout is active in this layer now."""
        return self.training and self.dropout > 0

    def operands(self) -> Projection:
        """Return the operands of y: the trained modules of a layer with folded others, all R with frozen others."""
        trained = self.selected_index if self._unselected == "frozen" else None  # no index while nothing is selected
        lora_A, lora_B = (self.lora_A, self.lora_B) if trained is None else self._merged_factors()
        if lora_A.shape[0] == 0:  # no module is trained and gets a gradient, as when the layer runs alone
            lora_A, lora_B = lora_A.detach(), lora_B.detach()
        return Projection(self.weight, lora_A, lora_B, self.bias, self.scale, trained)

    def state(self) -> _State:
        """Return what y depends on besides x, to detect a change."""
        held = self._parameters
        tensors = tuple(held.get(name) for name in ("weight", "bias", "lora_A", "lora_B", "full_A", "full_B"))
        marks: list[float | None] = [self.scale, self.drops]
        for t in tensors:
            marks += (None,) if t is None else (id(t), t._version, t.data_ptr())
        return _State(tuple(marks), tensors)

    def _apply(self, fn: Any, recurse: bool = True) -> SiblingPLoRALinear:
        self.shared.leave_round()
        super()._apply(fn, recurse)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled layer and enter it into the copy of its group."""
        super().__setstate__(state)
        self.shared.enter(self.place, self)


def _circumstances(x: Tensor) -> tuple[object, ...]:
    """Return what must not change while outputs are kept: x's version, the grad mode, the CUDA stream, a capture."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return x._version, torch.is_grad_enabled(), stream, capturing


def _may_share(x: Tensor) -> bool:
    """Say whether outputs of x may be computed ahead: no inference tensor, torch.func transform or autocast to cast."""
    if x.numel() == 0 or x.dim() == 0 or x.is_inference():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return autocast_dtype(x.device.type) in (None, x.dtype) or x.dtype is torch.float64


def _fit_together(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Say whether the projections can be computed together. If they do not fit, the layer runs alone and raises."""
    weights = [projection.weight for projection in projections]
    bases = weights + [projection.bias for projection in projections if projection.bias is not None]
    factors = [factor for projection in projections for factor in (projection.lora_A, projection.lora_B)]
    of_factors, dtype, device, k = factors[0].dtype, x.dtype, x.device, x.shape[-1]
    return (
        not is_watched(x, *bases, *factors)
        and all(t.device == device and not t.is_inference() for t in (*bases, *factors))
        and all(base.dtype is dtype for base in bases)
        and may_adapt(of_factors, dtype)
        and all(factor.dtype is of_factors for factor in factors)
        and all(weight.shape[1] == k and weight.is_contiguous() for weight in weights)
        and not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights))
    )
