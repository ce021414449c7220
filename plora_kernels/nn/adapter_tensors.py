"""The tensors of an adapter's file: gathered from a model to be saved, and fitted to a model that loads them."""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from plora_kernels.checks import DTYPES
from plora_kernels.errors import ConfigError, DTypeError, RankError, ShapeError, TargetError
from plora_kernels.nn.adapter_config import shown
from plora_kernels.nn.adapter_files import CONFIG_NAME, renamed_by_peft
from plora_kernels.nn.embeddings import embeddings_of
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.peft_layout import PREFIX, AdaptedLayer, Layout
from plora_kernels.nn.plain_names import plain_names, with_plain_names
from plora_kernels.nn.storages import storage_of, storage_uses
from plora_kernels.selection import MAX_RANK

# PEFT's keys have no adapter's name; those of a whole state dict do, as in "lora_A.default.weight".
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight\Z")


def factor_key(module: str, side: str) -> str:
    """Return the key of a module's A or B.

    >>> factor_key("encoder.0", "A")
    'base_model.model.encoder.0.lora_A.weight'
    """
    return f"{PREFIX}{module}.lora_{side}.weight"


# -------------------------------------------------------------------------------------------------------- saving


def gather(
    model: nn.Module,
    layers: Mapping[str, FusedPLoRALinear],
    layout: Layout,
    more: Sequence[nn.Module],
    keys: Sequence[str],
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their keys in the file, on the CPU.

    Args:
        layers: the adapted layers by plain name. layout: what PEFT makes of the model; its whole modules are gathered.
        more: further modules, such as embeddings. keys: further tensors, by their keys in the base model.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[factor_key(name, "A")], tensors[factor_key(name, "B")] = layer.factors()
    names = plain_names(model)
    roots = [*layout.whole, *(names[name] for name, module in model.named_modules() if _is_one_of(module, more))]
    file_keys = {key: file_key for file_key, key in layout.base_keys.items()}
    owners = {key.rpartition(".")[0] for key in keys}
    for name, module in model.named_modules():
        inside = any(f"{names[name]}.".startswith(f"{root}.") for root in roots)
        if not inside and names[name] not in owners:
            continue
        for leaf, value in module.state_dict().items():
            key = f"{names[name]}.{leaf}" if names[name] else leaf
            # A layer's own factors are no tensors of the base model; what lies deeper comes with the module it is in.
            if key in file_keys and "." not in leaf and (inside or key in keys):
                tensors[file_keys[key]] = value
    return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}


def _is_one_of(module: nn.Module, modules: Iterable[nn.Module]) -> bool:
    return any(module is other for other in modules)


# ------------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Fitted:
    """A file's tensors that fit a model, by plain names.

    Attributes:
        factors: A (R, K) and B (N, R) by layer.
        others: further tensors by their keys in the model.
        originals: the base's values of modules saved whole. PEFT keeps both and, asked for embeddings, saves both.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    others: dict[str, Tensor] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)


def with_present_names(tensors: Mapping[str, Tensor], model: nn.Module, lora: Any) -> Mapping[str, Tensor]:
    """Return the tensors by the names that the model's modules have now, if some factors are for none of these.

    transformers 5 keeps the older names of modules, such as those of the parts of LLaVA, in a table of its own, by
    which PEFT renames the keys of an adapter (`lora`, its configuration) that it loads.
    """
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if _modules_of(tensors) <= known:
        return tensors
    renamed = renamed_by_peft(tensors, model, lora)
    return renamed if _modules_of(renamed) <= known else tensors


def check_modules_exist(tensors: Iterable[str], model: nn.Module, source: object) -> None:
    """Raise unless there are factors in the file, and every module they belong to is in the model."""
    modules = _modules_of(tensors)
    if not modules:
        raise ConfigError(f"{source} holds no LoRA factors")
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for module in modules:
        if module not in known:
            raise TargetError(f"the adapter has factors for {shown(module)}, which is not in the model")


def _modules_of(tensors: Iterable[str]) -> Set[str]:
    """Return the names of the modules that the factors are for, in their order."""
    return {match["module"]: None for match in map(_FACTOR.match, tensors) if match}.keys()


def fit(tensors: Mapping[str, Tensor], layout: Layout, source: object) -> Fitted:
    """Match a file's tensors with the layers that PEFT adapts for its configuration, each with its rank.

    Raises:
        TargetError: a layer is no plain nn.Linear, a tensor is missing, or one belongs to nothing.
        ShapeError: a tensor has another shape than the layer and the configuration's rank give it.
        RankError: a rank above 256. DTypeError: a tensor of another kind than the one it is for.
        ConfigError: the factors of several adapters, or different values for one weight.
    """
    left = _without_adapter_names(tensors, layout, source)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layout.layers.items():
        if type(layer.base) is not nn.Linear:
            kind = type(layer.base).__name__
            raise TargetError(f"the adapter targets {name!r}, a {kind}; only plain nn.Linear works")
        factors[name] = _factors_of(name, layer, left, source)
    fitted = Fitted(factors)
    for key in layout.shapes:
        if key not in left and key in layout.base_keys:
            raise TargetError(f"{source} misses {layout.base_keys[key]!r}, which is part of a module saved whole")
    for key, value in left.items():
        match, copied = _FACTOR.match(key), _copied_key(key, layout.whole)
        if key in layout.base_keys:
            fitted.others[layout.base_keys[key]] = value
        elif copied is not None:
            if copied[0] == "original_module":
                fitted.originals[copied[1]] = value
        elif match:
            raise TargetError(
                f"{source} has factors for {shown(match['module'])}, which {CONFIG_NAME} beside it does not target; "
                "are they of one adapter?"
            )
        else:
            name = key.removeprefix(PREFIX)
            reason = "PEFT does not read" if name in layout.base_keys.values() else "is not in the model"
            raise TargetError(f"the adapter holds {shown(name)}, which {reason}")
    return fitted


def _copied_key(key: str, whole: Iterable[str]) -> tuple[str, str] | None:
    """Split the key of a second copy of a module saved whole into PEFT's name for the copy and the key in the model."""
    for name in whole:
        for copied in ("original_module", "modules_to_save"):
            if key.startswith(f"{PREFIX}{name}.{copied}."):
                return copied, f"{name}.{key.removeprefix(f'{PREFIX}{name}.{copied}.')}"
    return None


def still_tied(fitted: Fitted, model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor]:
    """Return the other tensors with the base's values that a module not saved whole shares with one that is."""
    own, inside = model.state_dict(), tuple(f"{name}." for name in whole)
    found: dict[str, Tensor] = {}
    for key, value in fitted.originals.items():
        for other, tensor in own.items():
            if key in own and storage_of(tensor) == storage_of(own[key]) and not other.startswith(inside):
                found[other] = value
    return found | fitted.others


def _without_adapter_names(tensors: Mapping[str, Tensor], layout: Layout, source: object) -> dict[str, Tensor]:
    """Return the tensors by PEFT's keys: the name of the one adapter is taken out of the keys of its factors."""
    renamed: dict[str, Tensor] = {}
    adapters: set[str] = set()
    for key, value in tensors.items():
        match = _FACTOR.match(key)
        if match and match["adapter"] and match["module"] in layout.layers and key not in layout.base_keys:
            adapters.add(match["adapter"])
            key = factor_key(match["module"], match["side"])
        elif match and not match["adapter"] and match["module"] in layout.layers:
            adapters.add("")
        renamed[key] = value
    if len(adapters) > 1:
        names = ", ".join(shown(name) if name else "without a name" for name in sorted(adapters)[:4])
        raise ConfigError(f"{source} holds the factors of several adapters ({names}); one is needed")
    return renamed


def _factors_of(name: str, layer: AdaptedLayer, left: dict[str, Tensor], source: object) -> tuple[Tensor, Tensor]:
    """Take A and B of a layer out of the tensors that are left, checked."""
    keys = {side: factor_key(name, side) for side in "AB"}
    found = [side for side, key in keys.items() if key in left]
    if not found:
        raise TargetError(
            f"{source} has no factors for {name!r}, which {CONFIG_NAME} beside it targets; are they of one adapter?"
        )
    if len(found) == 1:
        raise ConfigError(f"{source} holds lora_{found[0]} of {name!r} alone; both are needed")
    lora_A, lora_B = left.pop(keys["A"]), left.pop(keys["B"])
    n, k = layer.base.out_features, layer.base.in_features
    for side, value in (("A", lora_A), ("B", lora_B)):
        if value.dtype not in DTYPES:
            raise DTypeError(f"lora_{side} of {name!r} is {value.dtype}; {', '.join(map(str, DTYPES))} are supported")
    shapes = f"A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
    if lora_A.dim() != 2 or tuple(lora_B.shape) != (n, lora_A.shape[0]) or lora_A.shape[1] != k:
        raise ShapeError(
            f"the adapter has {shapes} for {name!r}; its weight (N={n}, K={k}) needs (R, {k}) and ({n}, R)"
        )
    if lora_A.shape[0] != layer.rank:
        raise ShapeError(
            f"the adapter has {shapes} for {name!r}, of rank {lora_A.shape[0]}; {CONFIG_NAME} gives it rank "
            f"{layer.rank}"
        )
    if layer.rank > MAX_RANK:
        raise RankError(
            f"the adapter has rank {layer.rank} for {name!r}; layers, as the kernels, take ranks 1 to {MAX_RANK}: "
            "merge it into the weight with PEFT's merge_and_unload instead"
        )
    for side, value in (("A", lora_A), ("B", lora_B)):
        _check_finite(f"lora_{side} of {name!r}", value, layer.base.weight.dtype)
    return lora_A, lora_B


def _check_finite(what: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise ConfigError if a tensor holds what is no finite number, or is none any more in the dtype it is cast to."""
    if not torch.isfinite(value).all():
        raise ConfigError(f"{what} holds NaN or infinity; finite numbers are needed")
    if not torch.isfinite(value.to(dtype)).all():
        most = value.abs().max().item()
        end = torch.finfo(dtype).max
        raise ConfigError(f"{what} holds {most:.3g}, and {dtype} ends at {end:.3g}; load the model in a wider dtype")


def check_others(others: Mapping[str, Tensor], model: nn.Module, whole: Iterable[str]) -> None:
    """Raise unless every tensor can be copied into the model's tensor of its key.

    Raises:
        ShapeError: a shape differs. DTypeError: numbers of another kind.
        ConfigError: values that are not finite or do not fit the model's dtype, where the model's are finite; different
            values for tensors that are tied in the model; those of `whole` modules will not be.
    """
    own = with_plain_names(model.state_dict(), model)
    tied: dict[int, str] = {}
    for key, value in others.items():
        if value.shape != own[key].shape:
            raise ShapeError(
                f"the adapter's {key!r} is {tuple(value.shape)}; the model's is {tuple(own[key].shape)}"
                + _how_to_resize(model, key, value)
            )
        _check_castable(f"the adapter's {key!r}", value, own[key])
        if any(key.startswith(f"{name}.") for name in whole):
            continue
        first = tied.setdefault(storage_of(own[key]), key)
        if others[first].shape == value.shape and not torch.equal(others[first], value):
            raise ConfigError(f"the adapter holds different values for {first!r} and {key!r}, which the model ties")


def _check_castable(what: str, value: Tensor, own: Tensor) -> None:
    """Raise unless a tensor means the same in the dtype of the model's own tensor, to rounding."""
    if value.dtype in DTYPES and own.dtype in DTYPES:
        if own.is_meta or torch.isfinite(own).all():  # a buffer may hold infinity, as some masks do
            _check_finite(what, value, own.dtype)
        return
    whole = not any(t.dtype.is_floating_point or t.dtype.is_complex or t.dtype is torch.bool for t in (value, own))
    if value.dtype == own.dtype or (whole and torch.equal(value.to(own.dtype).to(value.dtype), value)):
        return
    raise DTypeError(f"{what} is {value.dtype}; the model's is {own.dtype}")


def base_weights(others: Iterable[str], model: nn.Module, whole: Iterable[str]) -> list[str]:
    """Return those of the tensors that belong neither to a module saved whole nor to embeddings."""
    inside, embeddings = tuple(f"{name}." for name in whole), embeddings_of(model)
    found = []
    for key in others:
        owner = model.get_submodule(key.rpartition(".")[0])
        if not key.startswith(inside) and not isinstance(owner, nn.Embedding) and not _is_one_of(owner, embeddings):
            found.append(key)
    return found


def _how_to_resize(model: nn.Module, key: str, value: Tensor) -> str:
    """Return the end of a message about embeddings of another size; nothing for other tensors."""
    owner = model.get_submodule(key.rpartition(".")[0])
    if not hasattr(model, "resize_token_embeddings") or not _is_one_of(owner, embeddings_of(model)):
        return ""
    return f"; call model.resize_token_embeddings({value.shape[0]}) first"


def untie(model: nn.Module, whole: Iterable[str], undo: ExitStack) -> None:
    """Give modules that are saved whole weights of their own where they share one, as PEFT does, with a warning."""
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses = storage_uses(model)
    for name in whole:
        module = model.get_submodule(name)
        if all(uses[storage_of(parameter)] == 1 for parameter in module.parameters()):
            continue
        warnings.warn(f"{name!r} is saved whole, so its weights are no longer tied in the model", stacklevel=3)
        if places[id(module)] > 1:  # one module under several names, such as T5's embeddings
            undo.callback(model.set_submodule, name, module)
            model.set_submodule(name, copy.deepcopy(module))
            continue
        for part in module.modules():
            for leaf, parameter in list(part.named_parameters(recurse=False)):
                if uses[storage_of(parameter)] > 1:
                    undo.callback(setattr, part, leaf, parameter)
                    setattr(part, leaf, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
