"""The floating-point operations of a client's training and of the server, from the shapes of the products in a model.

A product of (m, k) with (k, n) takes 2mkn operations, and in the backward as many again for each of its operands that
has a gradient. Everything else (norms, activations, softmax, the optimiser) is not counted: it is of the order of the
tensors' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fed.config import RunConfig
from fed.errors import FedError
from fed.experiments.costs.workload import Workload, run_forward
from fed.models.shared_model import SharedModel

# The columns of dA and dB that are computed where modules are frozen: a selection is a buffer of a multiple of this.
FROZEN_MULTIPLE = 16


class Adapted(NamedTuple):
    """An adapted layer as one row of data meets it: `rows` rows of x (rows, K) W (N, K)ᵀ; `d_x`: whether x has a dX.

    `once` further rows are there however many rows of data a batch has, such as a table of relative positions.
    """

    rows: int
    K: int
    N: int
    d_x: bool
    once: int = 0


class Operations(NamedTuple):
    """The floating-point operations of a forward and of its backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """The operations of both."""
        return self.forward + self.backward


@dataclass
class Products(TorchFunctionMode):
    """Recorder of the products of a forward; adapted layers are recorded as what they are.

    `plain` are the operations of all products but those of adapted layers, `layers` the adapted layers.
    """

    forward: int = 0
    backward: int = 0
    layers: list[Adapted] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, and record it if it is a product."""
        given = dict(kwargs or {})
        found = func(*args, **given)
        if (rule := _RULES.get(func)) is not None:
            operations = rule(found, *args, **given)
            self.forward += operations.forward
            self.backward += operations.backward
        return found

    def on_layer(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Record an adapted layer that was called."""
        (x,) = inputs
        size: Any = layer
        rows = x.numel() // size.in_features
        self.layers.append(Adapted(rows, size.in_features, size.out_features, x.requires_grad))


def _product(found: Tensor, left: Tensor, right: Tensor, inner: int) -> Operations:
    forward = 2 * found.numel() * inner
    return Operations(forward, forward * (int(left.requires_grad) + int(right.requires_grad)))


def _linear(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Operations:
    return _product(found, x, weight, x.shape[-1])


def _matmul(found: Tensor, left: Tensor, right: Tensor) -> Operations:
    return _product(found, left, right, left.shape[-1])


def _added(found: Tensor, added: Tensor, left: Tensor, right: Tensor, **factors: Any) -> Operations:
    return _product(found, left, right, left.shape[-1])


def _convolution(found: Tensor, x: Tensor, weight: Tensor, *rest: Any, **named: Any) -> Operations:
    return _product(found, x, weight, weight[0].numel())


def _attention(
    found: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout_p: float = 0.0, **named: Any
) -> Operations:
    """Return the operations of attention: Q Kᵀ and P V, and in the backward dV, dP, dQ and dK.

    Without dropout it is fused, and the backward computes Q Kᵀ again.
    """
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    by_keys, by_values = 2 * scores * query.shape[-1], 2 * scores * value.shape[-1]
    gradients = any(one.requires_grad for one in (query, key, value))
    again = by_keys if dropout_p == 0 else 0
    return Operations(by_keys + by_values, (again + 2 * by_keys + 2 * by_values) * gradients)


_RULES: dict[Any, Callable[..., Operations]] = {
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm), _added),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _convolution),
    functional.scaled_dot_product_attention: _attention,
}


class Traced(NamedTuple):
    """The products in the forward of one row of data.

    `plain` are those outside of adapted layers and of a language model's output layer, `layers` the adapted layers.
    `once` are like `plain`, but of a whole batch, such as the angles of rotary positions. `logits` are the operations
    of an output layer for one token, 0 if there is none or it is adapted: then it is `output`, which runs from the
    token before the answer on, and again in the backward.
    """

    plain: Operations
    layers: tuple[Adapted, ...]
    logits: int = 0
    output: Adapted | None = None
    once: Operations = Operations(0, 0)


def trace(shared: SharedModel, load: Workload) -> Traced:
    """Return the products of one row of data through a model without values (`fed.models.weightless`).

    Raises FedError if the model does not run without them.
    """
    try:
        # What a second row adds is the row's own, and the rest is computed once for a batch.
        (one, _), (two, result) = _run(shared, load, 1), _run(shared, load, 2)
        layers = tuple(
            first._replace(rows=second.rows - first.rows, once=2 * first.rows - second.rows)
            for first, second in zip(one.layers, two.layers, strict=True)
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FedError(
            f"{type(shared.model).__name__} does not run on shapes alone, so its work cannot be estimated: {reason}"
        ) from error
    plain = Operations(two.forward - one.forward, two.backward - one.backward)
    once = Operations(one.forward - plain.forward, one.backward - plain.backward)
    if not load.answer:
        return Traced(plain, layers, once=once)
    output: Any = shared.model.get_output_embeddings()  # type: ignore[operator]
    if output not in shared.handle.layers.values():
        return Traced(plain, layers, 2 * output.weight.numel(), once=once)
    own = Adapted(load.answer + 1, output.in_features, output.out_features, result.requires_grad)
    return Traced(plain, layers, output=own, once=once)


def _run(shared: SharedModel, load: Workload, rows: int) -> tuple[Products, Tensor]:
    """Return the products of the forward of some rows, and what that returns."""
    with ExitStack() as stack:
        products = stack.enter_context(Products())
        for layer in shared.handle.layers.values():
            stack.callback(layer.register_forward_hook(products.on_layer).remove)
        return products, run_forward(shared, load, rows)


def step_operations(
    traced: Traced, load: Workload, samples: int, rank: int, held: int = 0, sides: str = "AB", again: bool = False
) -> Operations:
    """Return the operations of a step on `samples` rows of a client that trains `rank` modules a matrix.

    Of an adapted layer, with M rows and m = max(r, `held`) modules that are computed apart:

        forward   2M (KN + m (K + N))
        backward  2M (KN + m (K + N)) with dX, or else 2M m N for dS, which dA needs
                  + 2M r' (K + N) for dA and dB, or the one of them that `sides` ("AB", "A", "B") names

    `held` is R where unselected modules are frozen, and then r' is r rounded up to a multiple of 16; with 0 they are
    folded, or there are none, and r' = r. With `again` the backward computes the forward again (gradient
    checkpointing). A language model's output layer takes 2HV operations for each of the answer's tokens in the forward,
    and as many there for the gradient. Layers are taken to be without LoRA dropout.
    """
    modules = max(rank, held)
    trained = -(-rank // FROZEN_MULTIPLE) * FROZEN_MULTIPLE if held else rank
    forward, backward = (samples * each + once for each, once in zip(traced.plain, traced.once, strict=True))
    for layer in traced.layers:
        own = _of_layer(layer, samples, modules, trained, sides)
        forward, backward = forward + own.forward, backward + own.backward
    if again:
        backward += forward
    if traced.output is not None:
        own = _of_layer(traced.output, samples, modules, trained, sides)
        forward, backward = forward + own.forward, backward + own.total
    return Operations(forward + samples * 2 * traced.logits * load.answer, backward)


def _of_layer(layer: Adapted, samples: int, modules: int, trained: int, sides: str) -> Operations:
    each, K, N, d_x, once = layer
    rows = samples * each + once
    forward = 2 * rows * (K * N + modules * (K + N))
    backward = forward if d_x else 2 * rows * modules * N * ("A" in sides)
    return Operations(forward, backward + 2 * rows * trained * (K * ("A" in sides) + N * ("B" in sides)))


def evaluation_operations(traced: Traced, load: Workload, rank: int) -> int:
    """Return the operations of evaluating the server's model, with `rank` modules a matrix, on all test rows.

    A forward a row, and of an answer that is generated a forward of its prompt and of each new token.
    """
    row = step_operations(traced._replace(logits=0, output=None), load, 1, rank).forward
    if not load.answer:
        return load.test_rows * row
    token = traced.logits
    if traced.output is not None:
        token = _of_layer(traced.output._replace(rows=1), 1, rank, rank, "AB").forward
    generated = load.generated_rows * (row + load.new_tokens * (row // load.tokens + token))
    return load.test_rows * (row + token * load.answer) + generated


def fold_operations(layers: Sequence[tuple[int, int]], unselected: int) -> int:
    """Return the operations of folding `unselected` modules into every weight (N, K): Σ 2NK (R − r)."""
    return sum(2 * K * N * unselected for K, N in layers)


def server_operations(config: RunConfig, layers: Sequence[tuple[int, int]], modules: int, trained: int) -> int:
    """Return the operations of aggregating a round, with n = `modules` modules a matrix sent by all clients together.

    By method, for every matrix (N, K), R being the adapter's rank:

        means (FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA, Fed-PLoRA, HETLoRA)   2 n (K + N), and of the head 2 a number
        FLoRA         2NK n, the product that is folded into the base
        FedEx-LoRA    2NK (n + R), and the means
        FlexLoRA, raFLoRA   two QR decompositions with their Q, of (N, n) and (K, n + R): 4 N n² and 4 K (n + R)²;
                            the SVD of the core of their triangles, 20 (n + R)³; modules from it, 2 (n + R)² K + 2N n²

    Decompositions are to leading order; the constant of the SVD depends on the library. `trained` are the numbers of
    the head and how often they are sent, as a product. Noise that is measured (`measure.noise`) has decompositions of
    its own: of (N, 2n) and (K, 2n) for each matrix, 2 (N + K) (2n)².
    """
    rank, method = config.adapter.rank, config.method
    total = 2 * trained
    for K, N in layers:
        if method == "flora":
            total += 2 * N * K * modules
        elif method in ("flexlora", "raflora"):
            n, wide = min(modules, N), min(modules + rank, K)
            core = max(n, wide)
            total += 4 * N * n * modules + 4 * K * wide * (modules + rank) + 20 * core**3
            total += 2 * wide * wide * K + 2 * N * n * n
        else:
            total += 2 * modules * (K + N)
            total += 2 * N * K * (modules + rank) if method == "fedex-lora" else 0
        if config.measure.noise:
            total += 2 * (N * min(2 * modules, N) + K * min(2 * modules, K)) * 2 * modules
    return total
