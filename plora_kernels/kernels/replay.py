"""Calls that repeat: what one allocated and launched is recorded, and done again without working it out anew.

Between two calls of one form (sizes, strides, dtypes, alignments, numbers) only the tensors differ. Looking up blocks,
making views, and binding forty arguments in Triton keeps the host longer than a small layer keeps the device; a replay
puts the new tensors in the old places and hands the compiled kernels to the driver.

What runs in a recorded function must come through `empty`, `zeros` and `launch`, and return its arguments or what those
made. A tensor from anywhere else is found by its address, and such a call is never replayed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import configs
from .launch import dot_precision

F = TypeVar("F", bound=Callable[..., tuple[Tensor, ...]])

# More forms than a model has; what makes more has rows that keep changing.
MOST_FORMS = 4096


class _Allocation(NamedTuple):
    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool

    def run(self, slots: list[Tensor | None], device: torch.device) -> None:
        make = torch.zeros if self.zeros else torch.empty
        slots[self.slot] = make(self.shape, dtype=self.dtype, device=device)


class _Descriptor(NamedTuple):
    """A tensor descriptor of what lies in a slot."""

    slot: int
    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    def of(self, slots: Sequence[Tensor | None]) -> TensorDescriptor:
        return TensorDescriptor(slots[self.slot], self.shape, self.strides, self.block_shape)


class _Launch(NamedTuple):
    """A compiled kernel on its grid, and its arguments; `places` says which are tensors of which slots."""

    kernel: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int]]
    descriptors: list[tuple[int, _Descriptor]]
    last: tuple[int, ...]  # slots that nothing uses after this

    def run(self, slots: list[Tensor | None], device: torch.device) -> None:
        arguments = self.arguments.copy()
        for place, slot in self.places:
            arguments[place] = slots[slot]
        for place, descriptor in self.descriptors:
            arguments[place] = descriptor.of(slots)
        self.kernel(*arguments)
        for slot in self.last:
            slots[slot] = None


@dataclass(frozen=True)
class _Interpreted:
    """Stands for a compiled kernel where Triton interprets: constants among the arguments go back to their names."""

    kernel: Any
    names: tuple[str, ...]
    options: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            first = len(arguments) - len(self.names)
            named = dict(zip(self.names, arguments[first:], strict=True))
            self.kernel[grid](*arguments[:first], **named, **self.options)

        return run


class _Recording:
    """What a call does: slots hold its arguments' tensors, then what it allocates."""

    def __init__(self, arguments: Sequence[object]) -> None:
        self.tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.given = len(self.tensors)
        self.steps: list[_Allocation | _Launch] = []
        addresses = [tensor.data_ptr() for tensor in self.tensors if tensor.numel()]
        # Of two arguments at one address nobody could tell which a view belongs to.
        self.usable = len(set(addresses)) == len(addresses)

    def allocated(self, tensor: Tensor, zeros: bool) -> Tensor:
        # Held until the recording ends, so that no other tensor takes its address.
        self.steps.append(_Allocation(len(self.tensors), tuple(tensor.shape), tensor.dtype, zeros))
        self.tensors.append(tensor)
        return tensor

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        places, descriptors, kept = [], [], list(arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                kept[place] = None
                places.append((place, self._slot(argument)))
            elif isinstance(argument, TensorDescriptor):
                kept[place] = None
                sizes = [list(part) for part in (argument.shape, argument.strides, argument.block_shape)]
                descriptors.append((place, _Descriptor(self._slot(argument.base), *sizes)))
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(_Launch(compiled[x, y, z], kept, places, descriptors, ()))

    def replay(self, outputs: Sequence[Tensor]) -> _Replay | None:
        """Return the replay, or None where a tensor came from somewhere else."""
        kept = [self._slot(output) for output in outputs]
        if not self.usable:
            return None
        seen = set(kept)
        steps: list[_Allocation | _Launch] = []
        for step in reversed(self.steps):
            if isinstance(step, _Launch):
                used = {slot for _, slot in step.places} | {descriptor.slot for _, descriptor in step.descriptors}
                step = step._replace(last=tuple(sorted(slot for slot in used - seen if slot >= self.given)))
                seen |= used
            steps.append(step)
        return _Replay(steps[::-1], len(self.tensors) - self.given, kept)

    def _slot(self, tensor: Tensor) -> int:
        """Return whose memory a tensor is: the tensor itself, or a view that begins where it does."""
        for slot, known in enumerate(self.tensors):
            if known is tensor:
                return slot
        address = tensor.data_ptr() if tensor.numel() else 0
        for slot, known in enumerate(self.tensors):
            if address and known.data_ptr() == address:
                return slot
        self.usable = False
        return 0


class _Replay(NamedTuple):
    steps: list[_Allocation | _Launch]
    allocations: int
    outputs: list[int]

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        device, slots = tensors[0].device, [*tensors, *[None] * self.allocations]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                for step in self.steps:
                    step.run(slots, device)
        else:
            for step in self.steps:
                step.run(slots, device)
        return tuple(slots[slot] for slot in self.outputs)  # type: ignore[misc]


class _Local(threading.local):
    """The recording of the call this thread is in, or None: autograd differentiates in threads of its own."""

    recording: _Recording | None = None


_local = _Local()


def replayed(function: F) -> F:
    """Record what `function` does at the first call of a form, and replay it at the next.

    Its arguments are tensors, at least one, all of one device, numbers and None; it returns tensors. Nothing is
    replayed while blocks are forced or noted.
    """
    replays: dict[tuple[object, ...], _Replay] = {}

    @functools.wraps(function)
    def call(*arguments: Any) -> tuple[Tensor, ...]:
        state, first = configs.tables_state(), arguments[0]
        if state is None or first.is_meta:
            return function(*arguments)
        form: list[object] = [state, first.device, dot_precision(first.dtype)]
        tensors = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                tensors.append(argument)
                form += (argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16)
            else:
                form.append(argument)
        key = tuple(form)
        replay = replays.get(key)
        if replay is not None:
            return replay.run(tensors)
        recording = _Recording(arguments)
        outer, _local.recording = _local.recording, recording
        try:
            outputs = function(*arguments)
        finally:
            _local.recording = outer
        replay = recording.replay(outputs)
        if replay is not None:
            if len(replays) >= MOST_FORMS:
                replays.clear()
            replays[key] = replay
        return outputs

    return cast(F, call)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.empty` of this shape, contiguous."""
    tensor, recording = torch.empty(shape, dtype=dtype, device=device), _local.recording
    return tensor if recording is None else recording.allocated(tensor, zeros=False)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.zeros` of this shape, contiguous."""
    tensor, recording = torch.zeros(shape, dtype=dtype, device=device), _local.recording
    return tensor if recording is None else recording.allocated(tensor, zeros=True)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Run a kernel: its arguments in order, its constants and Triton's options by name, as `kernel[grid](…)` does."""
    compiled, recording = kernel[grid](*arguments, **named), _local.recording
    if recording is not None:
        names = tuple(kernel.arg_names[len(arguments) :])
        constants = [named.pop(name) for name in names]
        if compiled is None:
            compiled = _Interpreted(kernel, names, named)
        recording.launched(compiled, grid, (*arguments, *constants))
