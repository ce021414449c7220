"""`QuantizedPLoRALinear`: R parallel one-rank modules over a quantised linear, in the frozen form."""

from __future__ import annotations

from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor, nn

from plora_kernels.checks import check_factors, check_group_factors, check_unselected
from plora_kernels.errors import DTypeError, StateError
from plora_kernels.nn.adapter_dtype import check_adapter_dtype
from plora_kernels.nn.distributed import refuse_unreduced
from plora_kernels.nn.linear import FusedPLoRALinear
from plora_kernels.nn.quantized.kind import QuantizedKind
from plora_kernels.nn.quantized.known import check_quantized, kind_of
from plora_kernels.nn.quantized.product import Call, multiply
from plora_kernels.nn.replaceable import class_name
from plora_kernels.nn.row_groups import GroupModules

_BASE = "base_layer."


class QuantizedPLoRALinear(FusedPLoRALinear):
    """Compute y = x Wᵀ + bias + s·Σ_j b_j a_jᵀ x over R one-rank modules, where W is held quantised.

    The quantised module itself is `base_layer`; its weight and bias are frozen. Factors, selections, groups and dropout
    are those of `FusedPLoRALinear`, but modules cannot be folded into the weight: `select` needs unselected="frozen",
    and `merge` is refused. y and dX are those of the dequantised weight (`quantized.product`), in the dtype that the
    quantised module itself would return. Factors are float32 by default. `state_dict` holds what that of the quantised
    module holds, and lora_A and lora_B in full; loading one needs the same quantised weight.

    `inject` makes these layers of quantised linears.
    """

    base_layer: nn.Linear
    check_base = staticmethod(check_quantized)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """Return the quantised weight, in its library's packing."""
        return cast(nn.Parameter, self.base_layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """Return the quantised module's bias (N,) or None."""
        return cast(nn.Parameter | None, self.base_layer.bias)

    @property
    def kind(self) -> QuantizedKind:
        """Return how the weight is quantised."""
        kind = kind_of(self.base_layer)
        if kind is None:
            raise StateError(f"base_layer is now a {class_name(self.base_layer)}, which is not quantised")
        return kind

    def _take_base(self, base: nn.Linear, adapter_dtype: torch.dtype | str) -> torch.dtype:
        factors = check_adapter_dtype(adapter_dtype)
        if factors is torch.float64:
            raise DTypeError("adapter_dtype is torch.float64, but the weight is quantised: use 'auto' (float32)")
        self.base_layer = base
        return torch.float32 if isinstance(factors, str) else factors

    def give_base(self, linear: nn.Linear) -> nn.Linear:
        """Return the quantised module itself, as it is now."""
        return self.base_layer

    # ------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """Return y (…, N) for x (…, K); inside `Injected.grouped` every group of samples uses its own modules."""
        if self.disabled:
            return self._base(x)
        if self.groups is not None:
            return self._of_groups(x, self.groups if self.training else self.groups.without_dropout())
        if not torch.compiler.is_compiling():
            refuse_unreduced(self.lora_A, self.lora_B)
        lora_A, lora_B = self._merged_factors()
        index = self.selected_index.to(x.device) if self.selected_index is not None else None
        check_factors(self._outline(), lora_A, lora_B)
        p, seed = self._dropout(x.device)
        call = Call("linear", self.base_layer, self.kind, (index,), self.scale, p, (seed,))
        return multiply(call, x, lora_A, lora_B)

    def _of_groups(self, x: Tensor, groups: GroupModules) -> Tensor:
        numbers = groups.rows.numbers(x) if groups.dropout_p else None
        call = Call(
            "grouped_linear",
            self.base_layer,
            self.kind,
            (groups.index, groups.rows.offsets(x), groups.scales),
            groups.scale,
            groups.dropout_p,
            (groups.dropout_seeds, numbers),
        )
        return multiply(call, x, groups.lora_A, groups.lora_B)

    def _base(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + bias (…, N) by the product that the layer uses with its modules, of the dequantised weight.

        The quantised module itself is not called: it might repack its weight for good.
        """
        zeros = self.lora_A.new_zeros(1, self.in_features), self.lora_B.new_zeros(self.out_features, 1)
        return multiply(Call("linear", self.base_layer, self.kind, (None,), self.scale, 0.0, (None,)), x, *zeros)

    def check_groups(self, groups: GroupModules) -> None:
        """Raise ShapeError or RankError unless the groups' factors fit the layer."""
        check_group_factors(self._outline(), groups.lora_A, groups.lora_B, len(groups.rows))

    def _outline(self) -> Tensor:
        """Return a tensor with the shape of the dequantised weight and no memory."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    # ---------------------------------------------------------------------------------------------- the frozen form

    def check_selectable(self, unselected: str, size: int | None = None) -> None:
        """Raise the ConfigError or StateError that `select` of `size` modules would raise; change nothing."""
        check_unselected(unselected)
        if unselected != "frozen":
            self._refuse_folding("modules cannot be folded into it: select with unselected='frozen'")
        super().check_selectable(unselected, size)

    def merged_weight(self) -> NoReturn:
        """Raise StateError, as `merge` does: the modules of a quantised layer stay beside its weight."""
        self._refuse_folding(
            "its modules cannot be merged into it: keep the adapter beside it (the frozen form), or load the adapter "
            "into the model in bf16, fp16 or fp32 and merge there"
        )

    def _refuse_folding(self, what: str) -> NoReturn:
        raise StateError(f"the weight is quantised ({self.kind.name}), and {what}")

    def _beside_weight(self, factor: Tensor) -> Tensor:
        return factor

    # ------------------------------------------------------------------------------------------- casts, state dicts

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or cast the layer; a cast that would destroy the packed weight raises StateError."""
        weight = self.weight
        if not self.kind.survives_casts(self.base_layer):
            probe = torch.empty(0, dtype=weight.dtype, device=weight.device)
            if fn(probe).dtype is not weight.dtype:
                raise StateError(
                    f"the quantised weight is packed as {weight.dtype} (quant_storage), and a cast to "
                    f"{fn(probe).dtype} would destroy it: move the model without a dtype"
                )
        return super()._apply(fn, recurse)

    def state_dict(self, *arguments: Any, **named: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the quantised module's entries under its own keys, lora_A (R, K) and lora_B (N, R)."""
        found: dict[str, Any] = super().state_dict(*arguments, **named)
        prefix = named.get("prefix", arguments[1] if len(arguments) > 1 else "")
        for key in [key for key in found if key.startswith(prefix + _BASE)]:
            found[prefix + key.removeprefix(prefix + _BASE)] = found.pop(key)
        return found

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Load the factors. The quantised weight is not loaded: what the state dict holds of it must be its own."""
        given, prefix, metadata, *_, errors = arguments
        own = self.base_layer.state_dict()
        base = {key: given.pop(key) for key in list(given) if self._is_of_base(key, prefix)}
        differ = [key for key, value in base.items() if not _equal(value, own.get(key.removeprefix(prefix)))]
        if differ:
            errors.append(f"{differ[0]!r} is not what the quantised layer holds; load the base model by its library")
        if base and metadata.get("assign_to_params_buffers", False):
            errors.append(f"assign=True would replace the quantised weight {prefix}weight; load without it")
        # The module itself then finds its own weight and bias, which change nothing, and misses neither.
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if prefix + name in base and value is not None:
                given[prefix + _BASE + name] = value
        super()._load_from_state_dict(*arguments)

    @staticmethod
    def _is_of_base(key: str, prefix: str) -> bool:
        return key.startswith(prefix) and key.removeprefix(prefix) not in ("lora_A", "lora_B")


def _equal(value: object, own: object) -> bool:
    """Say whether two entries of a state dict are the same, tensors of torchao by what they dequantise to.

    Others are compared by their bytes: those of a weight that is packed as floating-point numbers may be NaN.
    """
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return value is own or bool(value == own)
    if hasattr(value, "dequantize") and hasattr(own, "qdata") and hasattr(value, "qdata"):
        value, own = value.dequantize(), own.dequantize()
    if value.shape != own.shape or value.dtype is not own.dtype:
        return False
    return torch.equal(_bytes_of(value.to(own.device)), _bytes_of(own))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
