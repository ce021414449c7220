"""Name the adapted layers that a model's first forward pass does not call."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from plora_kernels.errors import PLoRAWarning
from plora_kernels.nn.targets import shortened


class CallWatch:
    """Warn once, after the model's first complete forward pass, about layers that it did not call.

    A layer that is never called has an adapter without effect, and if other code reads its weight, folding modules into
    it changes the results. During that pass the layers have hooks. Two hooks of the model stay until `stop`, because
    torch compiles a model anew when its hooks change; they do nothing while it compiles or exports the model. They are
    copied and pickled with the model.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Start to watch: `layers` are modules of `model` by name."""
        self._layers = dict(layers)
        self._seen: set[str] = set()
        self._done = False
        self._of_layers: list[RemovableHandle] = []
        self._of_model = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]

    def stop(self) -> None:
        """Remove all hooks, without a warning."""
        self._release(self._of_layers)
        self._release(self._of_model)

    def _begin(self, model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._done:
            return
        if named.get("encoder_outputs") is not None:
            self._release(self._of_layers)  # generation calls the encoder by itself, so this pass is not complete
            return
        if self._of_layers:
            return  # of a pass that failed, or that runs in another thread
        for name, layer in self._layers.items():
            self._of_layers.append(layer.register_forward_pre_hook(functools.partial(self._note, name)))

    def _note(self, name: str, *_: Any) -> None:
        self._seen.add(name)

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or not self._of_layers:
            return
        self._done = True
        self._release(self._of_layers)
        uncalled = [name for name in self._layers if name not in self._seen]
        if uncalled:
            warnings.warn(
                f"the first forward pass did not call these adapted layers: {shortened(uncalled)}; that is normal for "
                "experts and layers that were skipped this time, but an adapter of a layer that is never called has "
                "no effect, and if its weight is read elsewhere select() changes results: exclude such layers",
                PLoRAWarning,
                stacklevel=_frames_to_caller(),
            )

    @staticmethod
    def _release(handles: list[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()


def _frames_to_caller() -> int:
    """Return the stack level of the code that called the model: past the hook that asks and nn.Module's own frames."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename == nn.modules.module.__file__:
        level, frame = level + 1, frame.f_back
    return level
