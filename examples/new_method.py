"""A new federated method in forty lines: the server takes the median of each number over the clients that trained it.

    python examples/new_method.py --out runs/median

A mean follows a client that sends numbers of any size; a median does not, as long as most clients that trained a
module are honest. Both methods run on the same rotated digits, clients and batches.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fed import commands, config, methods
from fed.methods import fed_plora
from fed.methods.average import next_round, visit_counts
from fed.simulation.run_directory import read_rows
from fed.types import ClientUpdate, ServerState


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return every a_j and b_j as the median, element by element, over the clients that trained module j.

    A module that no client trained keeps its value. The head is averaged.
    """
    factors = {}
    for matrix, (A, B) in server.adapter.factors.items():  # A (R, K), B (N, R)
        A, B = A.clone(), B.clone()
        for module in range(len(A)):
            trained = [update for update in updates if module in update.selected[matrix]]
            places = [update.selected[matrix].index(module) for update in trained]
            sent = [(*update.factors[matrix], at) for update, at in zip(trained, places, strict=True)]
            if sent:
                A[module] = torch.stack([a[at].double() for a, _, at in sent]).quantile(0.5, dim=0).to(A.dtype)
                B[:, module] = torch.stack([b[:, at].double() for _, b, at in sent]).quantile(0.5, dim=0).to(B.dtype)
        factors[matrix] = (A, B)
    following = next_round(server, updates, replace(server.adapter, factors=factors))
    return replace(following, visits=visit_counts(server, updates))


# Clients start as in Fed-PLoRA: with all modules, of which each trains r_i, chosen as `adapter.selection` says.
MEDIAN = methods.Method(
    "Fed-PLoRA, medians", fed_plora.start, aggregate, by_module=True, moves_factors=True, selects=True
)


def main(arguments: list[str] | None = None) -> dict[str, float | None]:
    """Run both methods and return their last accuracies."""
    parser = argparse.ArgumentParser(description="Compare a new federated method with Fed-PLoRA on rotated digits.")
    parser.add_argument("--out", type=Path, default=Path("runs/median"), help="the folder of the two runs")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further keys of the configuration")
    options = parser.parse_args(arguments)

    methods.METHODS["median"] = MEDIAN
    accuracies = {}
    for method in ("fed-plora", "median"):
        settings = [f"method={method}", f"rounds={options.rounds}", "model.pretrain_steps=150", *options.set]
        out = options.out / method
        commands.run(config.load("digits", settings), out, overwrite=True, centralised=False)
        accuracies[method] = read_rows(out)[-1]["accuracy"]
    for method, accuracy in accuracies.items():
        print(f"{methods.find(method).title}: accuracy {accuracy:.3f} after {options.rounds} rounds")
    return accuracies


if __name__ == "__main__":
    main()
