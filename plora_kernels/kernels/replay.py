"""Record and replay repeated calls: their allocations and kernel launches.

Two calls of the same form (sizes, strides, dtypes, alignments, numbers) differ only in their tensors. Looking up
blocks, making views and binding forty arguments in Triton takes more host time than a small layer takes on the device.
The first call of a form is therefore recorded; a replay puts the new tensors into the recorded arguments and passes the
compiled kernels to the driver.

A recorded function must allocate by `empty` and `zeros`, launch by `launch`, and get cached tensors by `look_up`. It
may return only its arguments and tensors from these functions. A tensor of another origin is detected, because its
address is unknown, and a call that uses one is never replayed.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from plora_kernels.kernels.launch import dot_precision
from plora_kernels.tuning import lookup

F = TypeVar("F", bound=Callable[..., Any])

# The recordings kept for a function. No model has so many forms; only a changing number of rows makes more.
MOST_FORMS = 4096


class _Allocation(NamedTuple):
    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool

    def run(self, slots: list[Tensor | None], device: torch.device) -> None:
        make = torch.zeros if self.zeros else torch.empty
        slots[self.slot] = make(self.shape, dtype=self.dtype, device=device)


class _Look(NamedTuple):
    """A tensor that `function` returns for the tensor in slot `of`."""

    slot: int
    function: Callable[..., Tensor]
    of: int
    numbers: tuple[int, ...]

    def run(self, slots: list[Tensor | None], device: torch.device) -> None:
        slots[self.slot] = self.function(slots[self.of], *self.numbers)


class _Descriptor(NamedTuple):
    """A tensor descriptor of the tensor in a slot."""

    slot: int
    shape: list[int]
    strides: list[int]
    block_shape: list[int]

    @property
    def slots(self) -> tuple[int, ...]:
        return (self.slot,)

    def of(self, slots: Sequence[Tensor | None]) -> TensorDescriptor:
        return TensorDescriptor(slots[self.slot], self.shape, self.strides, self.block_shape)


class _Tuple(NamedTuple):
    """A tuple of arguments; `places` are pairs (position, slot) of its tensors."""

    items: list[Any]
    places: list[tuple[int, int]]

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(slot for _, slot in self.places)

    def of(self, slots: Sequence[Tensor | None]) -> tuple[Any, ...]:
        items = self.items.copy()
        for place, slot in self.places:
            items[place] = slots[slot]
        return tuple(items)


class _Launch(NamedTuple):
    """A compiled kernel with its grid and arguments.

    `places` are pairs (position, slot) of the arguments that are tensors; `made` are pairs (position, argument) of
    those that are made from tensors at each replay.
    """

    kernel: Callable[..., None]
    arguments: list[Any]
    places: list[tuple[int, int]]
    made: list[tuple[int, _Descriptor | _Tuple]]
    last: tuple[int, ...]  # slots whose tensors are freed after this launch, because no later step uses them

    def run(self, slots: list[Tensor | None], device: torch.device) -> None:
        arguments = self.arguments.copy()
        for place, slot in self.places:
            arguments[place] = slots[slot]
        for place, one in self.made:
            arguments[place] = one.of(slots)
        self.kernel(*arguments)
        for slot in self.last:
            slots[slot] = None


@dataclass(frozen=True)
class _Interpreted:
    """Takes the place of a compiled kernel under Triton's interpreter: it passes constexpr arguments by name."""

    kernel: Any
    names: tuple[str, ...]
    options: dict[str, Any]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            first = len(arguments) - len(self.names)
            named = dict(zip(self.names, arguments[first:], strict=True))
            self.kernel[grid](*arguments[:first], **named, **self.options)

        return run


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    """Yield the arguments, and in place of lists and tuples their items, recursively."""
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _flat(argument)
        else:
            yield argument


class _Recording:
    """The steps of a call. Slots are numbered: first the tensors among its arguments, then those it allocates."""

    def __init__(self, arguments: Sequence[object]) -> None:
        self.tensors = [argument for argument in _flat(arguments) if isinstance(argument, Tensor)]
        self.given = len(self.tensors)
        self.steps: list[_Allocation | _Look | _Launch] = []
        addresses = [tensor.data_ptr() for tensor in self.tensors if tensor.numel()]
        # Not replayable: two arguments at one address, because a view could belong to either, and tensors on several
        # devices, because one on the host is copied to the device.
        alone = len(set(addresses)) == len(addresses)
        self.usable = alone and len({tensor.device for tensor in self.tensors}) == 1

    def allocated(self, tensor: Tensor, zeros: bool) -> Tensor:
        # The tensor is held until the recording ends, so that no other one gets its address.
        self.steps.append(_Allocation(len(self.tensors), tuple(tensor.shape), tensor.dtype, zeros))
        self.tensors.append(tensor)
        return tensor

    def found(self, tensor: Tensor, function: Callable[..., Tensor], of: Tensor, numbers: tuple[int, ...]) -> None:
        self.steps.append(_Look(len(self.tensors), function, self._slot(of), numbers))
        self.tensors.append(tensor)

    def launched(self, compiled: Any, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        made: list[tuple[int, _Descriptor | _Tuple]] = []
        kept, places = self._places(arguments)
        for place, argument in enumerate(arguments):
            if isinstance(argument, TensorDescriptor):
                sizes = [list(part) for part in (argument.shape, argument.strides, argument.block_shape)]
                made.append((place, _Descriptor(self._slot(argument.base), *sizes)))
                kept[place] = None
            elif isinstance(argument, tuple):
                made.append((place, _Tuple(*self._places(argument))))
                kept[place] = None
        if not hasattr(compiled, "__getitem__"):  # Triton still compiles the kernel in the background
            self.usable = False
            return
        x, y, z = (*grid, 1, 1)[:3]
        self.steps.append(_Launch(compiled[x, y, z], kept, places, made, ()))

    def _places(self, arguments: Sequence[Any]) -> tuple[list[Any], list[tuple[int, int]]]:
        """Return the arguments with None for tensors, and pairs (position, slot) of these tensors."""
        places = [(place, self._slot(one)) for place, one in enumerate(arguments) if isinstance(one, Tensor)]
        return [None if isinstance(one, Tensor) else one for one in arguments], places

    def replay(self, outputs: Any) -> _Replay | None:
        """Return the replay, or None if the call cannot be replayed."""
        form = self._form(outputs)
        if not self.usable:
            return None
        seen = {slot for slot in _flat([form]) if slot is not None}
        steps: list[_Allocation | _Look | _Launch] = []
        for step in reversed(self.steps):
            if isinstance(step, _Launch):
                used = {slot for _, slot in step.places}.union(*(one.slots for _, one in step.made))
                step = step._replace(last=tuple(sorted(slot for slot in used - seen if slot >= self.given)))
                seen |= used
            steps.append(step)
        return _Replay(steps[::-1], len(self.tensors) - self.given, form)

    def _form(self, outputs: Any) -> Any:
        """Return the outputs with slot numbers in place of tensors.

        A view as output makes the call unusable: its slot is known by its address, but its shape and strides are not.
        """
        if isinstance(outputs, Tensor):
            self.usable &= any(known is outputs for known in self.tensors)
            return self._slot(outputs)
        return outputs if outputs is None else type(outputs)(map(self._form, outputs))

    def _slot(self, tensor: Tensor) -> int:
        """Return the slot of a tensor: of the tensor itself, or of the one at whose address a view begins."""
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
    steps: list[_Allocation | _Look | _Launch]
    allocations: int
    outputs: Any

    def run(self, tensors: Sequence[Tensor]) -> Any:
        device, slots = tensors[0].device, [*tensors, *[None] * self.allocations]
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                for step in self.steps:
                    step.run(slots, device)
        else:
            for step in self.steps:
                step.run(slots, device)
        return _filled(self.outputs, slots)


def _filled(form: Any, slots: Sequence[Tensor | None]) -> Any:
    """Return outputs of this form, with the slots' tensors in place of slot numbers."""
    if isinstance(form, int):
        return slots[form]
    return form if form is None else type(form)([_filled(part, slots) for part in form])


class _Local(threading.local):
    """This thread's current recording, or None. Autograd runs backwards in other threads, which record separately."""

    recording: _Recording | None = None


_local = _Local()


def replayed(function: F) -> F:
    """Wrap `function`: record its steps at the first call of a form, and replay them at later calls.

    Its arguments are tensors, numbers, None, and sequences of these; the first is a tensor or a sequence that begins
    with one. It returns tensors, None and sequences of them. A call with tensors on several devices is not replayed,
    nor is any call inside `override_blocks` or `record_blocks`.
    """
    replays: dict[tuple[object, ...], _Replay | None] = {}  # None: calls of this form cannot be replayed

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        state, first = lookup.tables_generation(), arguments[0]
        if not isinstance(first, Tensor):
            first = first[0]
        if state is None or first.is_meta:
            return function(*arguments)
        form: list[object] = [state, dot_precision(first.dtype)]
        tensors: list[Tensor] = []
        _look_at(arguments, form, tensors)
        key = tuple(form)
        if key in replays:
            replay = replays[key]
            return function(*arguments) if replay is None else replay.run(tensors)
        recording = _Recording(arguments)
        outer, _local.recording = _local.recording, recording
        try:
            outputs = function(*arguments)
        finally:
            _local.recording = outer
        if len(replays) >= MOST_FORMS:
            replays.clear()
        replays[key] = recording.replay(outputs)
        return outputs

    return cast(F, call)


def _look_at(arguments: Sequence[Any], form: list[object], tensors: list[Tensor]) -> None:
    """Append to `form` what identifies the form of the arguments, and to `tensors` the tensors among them."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            tensors.append(argument)
            place = argument.device, argument.data_ptr() % 16
            form += (argument.shape, argument.stride(), argument.dtype, place)
        elif isinstance(argument, list | tuple):
            form.append(len(argument))
            _look_at(argument, form, tensors)
        else:
            form.append(argument)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.empty` of this shape, contiguous, and record the allocation."""
    tensor, recording = torch.empty(shape, dtype=dtype, device=device), _local.recording
    return tensor if recording is None else recording.allocated(tensor, zeros=False)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `torch.zeros` of this shape, contiguous, and record the allocation."""
    tensor, recording = torch.zeros(shape, dtype=dtype, device=device), _local.recording
    return tensor if recording is None else recording.allocated(tensor, zeros=True)


def look_up(function: Callable[..., Tensor], of: Tensor, *numbers: int) -> Tensor:
    """Return `function(of, *numbers)`, a tensor that may be cached; replays call `function` again for their `of`."""
    recording, _local.recording = _local.recording, None
    try:
        tensor = function(of, *numbers)
    finally:
        _local.recording = recording
    if recording is not None:
        recording.found(tensor, function, of, numbers)
    return tensor


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, shares_multiprocessors: bool = False, **named: Any
) -> None:
    """Run a kernel as `kernel[grid](…)` does, and record the launch.

    Arguments are given in order, constexprs and Triton's options by name. None stands for a tensor that the launch does
    not have: it is a constexpr too, so what the kernel does under `is not None` is not compiled. With
    `shares_multiprocessors` programs of another launch run beside this one's and need shared memory too.
    """
    compiled, recording = kernel[grid](*arguments, **named), _local.recording
    if shares_multiprocessors and (function := getattr(compiled, "function", None)):  # none where nothing is loaded
        prefer_shared_memory(function)
    if recording is not None:
        names = tuple(kernel.arg_names[len(arguments) :])
        constants = [named.pop(name) for name in names]
        if compiled is None:
            compiled = _Interpreted(kernel, names, named)
        recording.launched(compiled, grid, (*arguments, *constants))


@functools.cache
def prefer_shared_memory(function: int) -> None:
    """Ask the driver to run a loaded kernel with as much shared memory on its multiprocessors as they have.

    A multiprocessor divides its memory into shared memory and L1 cache by what its first program prefers, and only
    changes that when it is idle. It is a preference: without it launches wait for each other, with the same results.
    """
    carveout, percent = 9, 100  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    with suppress(OSError):  # the driver's library has another name on this system
        ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), carveout, percent)
