"""The modules that are saved whole with an adapter, such as a classification head, by PEFT's rules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# When PEFT makes or loads an adapter of one of these tasks, it trains and saves a head under these names, listed by
# the configuration or not.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def modules_saved_whole(model: nn.Module, entries: Iterable[str], task_type: str | None) -> tuple[str, ...]:
    """Return the modules PEFT saves whole for `modules_to_save` entries: names that end with one, the outermost."""
    wanted = (*entries, *TASK_HEADS.get(task_type or "", ()))
    names = [name for name, _ in model.named_modules() if name.endswith(wanted)] if wanted else []
    return outermost(names)


def outermost(names: Iterable[str]) -> tuple[str, ...]:
    """Return those names that do not lie inside another of them."""
    kept = list(names)
    return tuple(name for name in kept if not any(name.startswith(f"{other}.") for other in kept))
