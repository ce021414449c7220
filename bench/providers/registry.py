"""The providers that are measured, all on the same tensors.

*base* is the frozen matmul alone, or a copy of the weight; *peft* PEFT's layer with adapters in the weight's dtype;
*peft-autocast* the same with fp32 adapters under autocast, which is what PEFT makes of a half-precision model;
*peft-compiled* is *peft* through `torch.compile`; *inplace* the in-place algebra of plain torch; *fused* this library.
If that has two ways, *fused* is the one that the op is about: *fused-apart* computes projections or weights one by one,
*fused-inplace* folds in place.

In mixed precision *peft* is PEFT as it is by default, with fp32 adapters and no autocast, *peft-compiled* the same
compiled; *fused-mixed* is this library with fp32 factors, *fused* with factors in the weight's dtype.
"""

from bench.cases import MIXED_OPS, Case, Op, Problem
from bench.providers.base import Maker, Provider
from bench.providers.fold import FOLD, FOLD_MANY, FOLD_OUT
from bench.providers.linear import DROPOUT, LAYER, MIXED
from bench.providers.projections import PROJECTIONS

MAKERS: dict[Op, dict[str, Maker]] = {
    "forward": LAYER,
    "forward_backward": LAYER,
    "fold": FOLD,
    "dropout": DROPOUT,
    "mixed_forward": MIXED,
    "mixed": MIXED,
    "projections_forward": PROJECTIONS,
    "projections": PROJECTIONS,
    "fold_out": FOLD_OUT,
    "fold_many": FOLD_MANY,
}
# Every provider of any op.
PROVIDERS = tuple(dict.fromkeys(name for makers in MAKERS.values() for name in makers))
# Providers that `python -m bench.gpu` times and the suites do not, except in mixed precision.
BEYOND_SUITES = ("peft-autocast", "inplace")


def provider_names(op: Op) -> tuple[str, ...]:
    """List the providers of the suites. PEFT's merge is a host-side state change and has no compiled form."""
    return tuple(name for name in MAKERS[op] if name not in BEYOND_SUITES or op in MIXED_OPS)


def every_provider(op: Op) -> tuple[str, ...]:
    """List every provider there is for an op."""
    return tuple(MAKERS[op])


def make_provider(name: str, case: Case, problem: Problem) -> Provider:
    """Build a provider for a case; raises ProviderUnavailableError if this machine cannot run it."""
    return MAKERS[case.op][name](case, problem)


def is_ours(name: str) -> bool:
    """Say whether a provider is this library."""
    return name.split("-")[0] == "fused"
