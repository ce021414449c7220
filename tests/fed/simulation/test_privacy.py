"""Private aggregation: clipping of the whole, sums, denominators and noise by hand; ε; and what is refused."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fed import methods
from fed.config import parse
from fed.errors import FedError
from fed.models.shared_model import adapted
from fed.seeding import standard_normal
from fed.simulation.clients import drawn
from fed.simulation.privacy import PrivateServer, clip_whole, most_often, secret_normal
from fed.simulation.privacy_accounting import epsilon, ratio_for
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.types import Adapter, Client, ClientResult, ClientStart, ServerState
from tests.support.equality import assert_equal
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data, update_of

pytest.importorskip("dp_accounting")

NOISY = {"clip": 0.5, "noise_multiplier": 0.2}


def test_normal_numbers_are_normal_and_keyed() -> None:
    for numbers in (standard_normal(20_000, 3, "noise"), secret_normal(20_000)):
        assert abs(numbers.mean()) < 0.03
        assert abs(numbers.std() - 1) < 0.02
        assert abs((numbers**3).mean()) < 0.1
        assert np.isfinite(numbers).all()
    assert (standard_normal(4, 3, "noise") == standard_normal(4, 3, "noise")).all()
    assert (standard_normal(4, 3, "noise") != standard_normal(4, 3, "other")).all()
    assert (secret_normal(4) != secret_normal(4)).all()


def test_the_whole_update_is_clipped_by_hand() -> None:
    """Changes of 2, 2 and, in the head, 1: the norm 3 is cut to 1.5. Within it nothing is; infinite ones count as 0."""
    start = ClientStart({"m": (torch.ones(2, 1), torch.zeros(1, 2))}, {"m": (1,)}, 1.0, "folded")
    update = update_of(0, [[3.0]], [[2.0]], 1.0, selected={"m": (1,)}, head={"h": torch.tensor([5.0])})
    head = {"h": torch.tensor([4.0])}
    factors, changes = clip_whole(start, head, update, 1.5)
    assert [own.item() for own in factors["m"]] == [1.0, 1.0]
    assert changes["h"].item() == 0.5
    factors, changes = clip_whole(start, head, update, 3.5)
    assert [*(own.item() for own in factors["m"]), changes["h"].item()] == [2.0, 2.0, 1.0]
    huge = replace(update, factors={"m": (torch.full((1, 1), 1e300, dtype=torch.float64), update.factors["m"][1])})
    assert clip_whole(start, head, huge, 1.0)[0]["m"][0].abs().item() <= 1.0


CLIENTS = tuple(Client(number, rank, n_samples=4) for number, rank in enumerate([1, 2, 2, 3]))


def private(**changes: Any) -> PrivateServer:
    config = make_config(clients={"per_round": 2}, privacy={**NOISY, **changes.pop("privacy", {})}, **changes)
    return PrivateServer.of(config, CLIENTS)


def test_denominators_are_expected_numbers() -> None:
    """Half of four clients is drawn; ranks sum to 8 of 3 modules."""
    server = ServerState(Adapter({"m": (torch.zeros(3, 1), torch.zeros(1, 3))}, 1.0))
    assert private().divisors(server, "m", 3).tolist() == pytest.approx([4 / 3] * 3)
    assert private(adapter={"selection": "first"}).divisors(server, "m", 3).tolist() == [2.0, 1.5, 0.5]
    shared = private(adapter={"selection": "shared-random"})
    assert sorted(shared.divisors(server, "m", 3).tolist()) == [0.5, 1.5, 2.0]
    method, found = methods.find("fed-plora"), torch.zeros(3, dtype=torch.float64)
    from fed.seeding import ClientRandom

    options = replace(server.options, selection="shared-random")
    for client in CLIENTS:
        chosen = method.start(replace(server, options=options), client, ClientRandom(5, 1, client.id)).selected["m"]
        found[list(chosen)] += 0.5
    assert torch.equal(found, shared.divisors(server, "m", 3))


def result_of(number: int, A: list[list[float]], B: list[list[float]], chosen: tuple[int, ...], **head: float) -> Any:
    update = update_of(number, A, B, 1.0, selected={"m": chosen}, head={"h": torch.tensor([head["h"]])})
    start = ClientStart({"m": (torch.zeros(3, 1), torch.zeros(1, 3))}, {"m": chosen}, 1.0, "folded")
    return ClientResult(CLIENTS[number], start, update, 1, None, None, None, 0.0, 0.0, None)


def test_a_round_by_hand() -> None:
    """Without noise: sums of what is left after clipping, by the fixed denominators; a faulty update counts as 0."""
    server = ServerState(Adapter({"m": (torch.zeros(3, 1), torch.zeros(1, 3))}, 1.0), {"h": torch.tensor([1.0])})
    own = replace(private(adapter={"selection": "first"}, privacy={"clip": 3.0}), multiplier=0.0)
    results = [
        result_of(0, [[2.0]], [[2.0]], (0,), h=2.0),  # norm 3: as it is
        result_of(1, [[4.0], [4.0]], [[0.0, 0.0]], (0, 1), h=3.0),  # norm 6: halved
        replace(result_of(2, [[9.0], [9.0]], [[9.0, 9.0]], (0, 1), h=9.0), fault="its training loss is nan"),
    ]
    following = own.aggregate(server, results)
    A, B = following.adapter.factors["m"]
    assert A.flatten().tolist() == pytest.approx([(2 + 2) / 2, 2 / 1.5, 0.0])
    assert B.flatten().tolist() == pytest.approx([2 / 2, 0.0, 0.0])
    assert following.head["h"].tolist() == pytest.approx([1 + (1 + 1) / 2])
    assert (following.round, following.visits["m"].tolist()) == (1, [2, 1, 0])


def test_noise_is_in_every_module_by_its_denominator() -> None:
    """Nobody sent anything: what moves is noise, in every coordinate, with the standard deviation z C / d_j."""
    width = 20_000
    server = ServerState(Adapter({"m": (torch.zeros(3, width), torch.zeros(width, 3))}, 1.0), {"h": torch.zeros(width)})
    for own in (private(adapter={"selection": "first"}), private(privacy={"secret_noise": True})):
        following = own.aggregate(server, [])
        A, B = following.adapter.factors["m"]
        divisors = own.divisors(server, "m", 3).clamp(min=1)
        for module in range(3):
            for row in (A[module], B[:, module]):
                assert row.std().item() == pytest.approx(0.1 / divisors[module].item(), rel=0.03)
        assert following.head["h"].std().item() == pytest.approx(0.1 / 2, rel=0.03)
        again = own.aggregate(server, []).adapter.factors
        assert torch.equal(again["m"][0], A) != own.config.privacy.secret_noise
    later = private(adapter={"selection": "first"}).aggregate(replace(server, round=1), [])
    earlier = private(adapter={"selection": "first"}).aggregate(server, [])
    assert not torch.equal(later.head["h"], earlier.head["h"])


@pytest.mark.parametrize("other", [None, "nan", "far"])
def test_one_client_moves_the_sums_by_at_most_2_c(other: str | None) -> None:
    """Whatever it sends, and whether it sends anything usable: in sums, before the division, the change is bounded."""
    server = ServerState(Adapter({"m": (torch.zeros(3, 1), torch.zeros(1, 3))}, 1.0), {"h": torch.zeros(1)})
    own = replace(private(), multiplier=0.0)
    first = result_of(0, [[1.0]], [[1.0]], (1,), h=1.0)
    kept, others = (
        result_of(1, [[5.0], [6.0]], [[7.0, 8.0]], (0, 1), h=9.0),
        {
            None: [],
            "nan": [replace(first, fault="its training loss is nan")],
            "far": [result_of(0, [[-1e9]], [[-1e9]], (1,), h=-1e9)],
        },
    )
    one, two = own.aggregate(server, [first, kept]), own.aggregate(server, [*others[other], kept])
    divisor = own.divisors(server, "m", 3)[0].item()
    moved = [divisor * (a - b) for a, b in zip(one.adapter.factors["m"], two.adapter.factors["m"], strict=True)]
    moved.append(2 * (one.head["h"] - two.head["h"]))
    total = torch.stack([part.norm() for part in moved]).norm().item()
    assert total <= 2 * 0.5 + 1e-6
    assert other is None or other == "nan" or total == pytest.approx(1.0, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- accounting


def test_epsilon_without_drawing_is_the_gaussian_mechanism_s() -> None:
    """RDP of order α is k α / (2 σ²); its conversion to ε at best is below the plain one, and above the exact value."""
    for ratio, rounds in ((1.0, 1), (2.0, 10), (5.0, 100)):
        found = epsilon(ratio, rounds, 1e-5, 20, 20)
        plain = min(
            rounds * order / (2 * ratio**2) + math.log(1e5) / (order - 1)
            for order in np.linspace(1.01, 200, 20_000).tolist()
        )
        assert 0.6 * plain < found <= plain + 1e-6
    assert epsilon(1.0, 0, 1e-5, 20, 10) == 0.0


def test_epsilon_grows_with_rounds_and_falls_with_noise_and_drawing() -> None:
    values = [epsilon(1.0, rounds, 1e-5, 100, 10) for rounds in (1, 2, 10)]
    assert values == sorted(values)
    assert epsilon(2.0, 10, 1e-5, 100, 10) < values[-1]
    assert epsilon(1.0, 10, 1e-5, 100, 10) < epsilon(1.0, 10, 1e-5, 100, 100)
    assert epsilon(1.0, 10, 1e-3, 100, 10) < values[-1]


def test_the_noise_for_an_epsilon_spends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = ratio_for(4.0, 10, 1e-5, 50, 50)
    assert 3.98 < epsilon(ratio, 10, 1e-5, 50, 50) <= 4.0
    assert epsilon(0.99 * ratio, 10, 1e-5, 50, 50) > 4.0
    monkeypatch.setattr("fed.simulation.privacy_accounting.MOST_NOISE", 2.0)
    with pytest.raises(FedError, match=r"privacy.target_epsilon is 3: no noise gives it"):
        ratio_for(3.0, 10, 1e-5, 50, 50)


def test_public_drawing_counts_the_client_that_took_part_most() -> None:
    config = make_config(clients={"per_round": 2})
    taken = [client.id for number in range(1, 8) for client in drawn(config, CLIENTS, number)]
    assert most_often(config, CLIENTS, 7) == max(map(taken.count, range(4)))
    own = private()
    assert own.spent(7)["epsilon"] == epsilon(0.1, most_often(config, CLIENTS, 7), 1e-5, 4, 4)
    secret = private(privacy={"sampling": "secret"})
    assert secret.spent(7)["epsilon"] == epsilon(0.1, 7, 1e-5, 4, 2)
    assert own.spent(0) == {"noise_std": 0.1, "epsilon": 0.0, "delta": 1e-5}


@pytest.mark.parametrize("sampling", ["public", pytest.param("secret", marks=pytest.mark.slow)])
def test_a_wished_for_epsilon_is_what_its_rounds_spend(sampling: str) -> None:
    wish = {"noise_multiplier": 0.0, "target_epsilon": 6.0, "target_rounds": 5, "sampling": sampling}
    own = private(privacy=wish)
    assert 5.9 < own.spent(5)["epsilon"] <= 6.0
    assert own.spent(4)["epsilon"] <= own.spent(5)["epsilon"]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("no", name="dp_accounting")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(FedError, match=r"dp_accounting is not installed; pip install 'plora-kernels\[privacy\]'"):
        private()


# ---------------------------------------------------------------------------------------------------------------- runs


def play(directory: Path, rounds: int = 3, resume: bool = False, **changes: Any) -> list[dict[str, Any]]:
    config = make_config(rounds=rounds, clients={"per_round": 4}, **changes)
    return simulate(config, make_data(), TinyClassifier(), HEAD, directory, resume=resume)


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
def test_a_private_run_is_the_same_after_an_interruption(execution: str, tmp_path: Path) -> None:
    settings = {"privacy": NOISY, "execution": execution, "clients_per_pass": 4}
    whole = play(tmp_path / "whole", **settings)
    play(tmp_path / "cut", rounds=1, **settings)
    cut = play(tmp_path / "cut", resume=True, **settings)
    assert [row["loss"] for row in whole] == [row["loss"] for row in cut]
    spent = [row["epsilon"] for row in whole[1:]]
    assert spent == [row["epsilon"] for row in cut[1:]] == sorted(spent)
    assert spent[0] > 0
    assert [row["noise_std"] for row in whole[1:]] == [pytest.approx(0.1)] * 3
    assert "epsilon" not in play(tmp_path / "plain")[-1]


def test_secret_noise_is_another_each_time_and_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    settings = {"privacy": {**NOISY, "secret_noise": True}}
    one = play(tmp_path / "one", rounds=1, **settings)
    assert one[1]["loss"] != play(tmp_path / "two", rounds=1, **settings)[1]["loss"]
    resumed = play(tmp_path / "one", rounds=2, resume=True, **settings)
    assert [row["loss"] for row in resumed[:2]] == [row["loss"] for row in one]
    assert resumed[2]["epsilon"] > resumed[1]["epsilon"]


def test_much_clip_and_little_noise_is_the_plain_mean(tmp_path: Path) -> None:
    """All four clients take part with rank R, so that the denominators are their number."""
    common = {"rounds": 2, "clients": {"per_round": 4, "ranks": [6]}}
    states = []
    for privacy in ({}, {"clip": 1e6, "noise_multiplier": 1e-12}):
        config = make_config(**common, privacy=privacy)
        with adapted(config, TinyClassifier(), HEAD) as shared:
            federation = Federation(config, make_data(), shared, pytest.fail)
            *_, last = federation.play(federation.beginning())
        states.append([*itertools.chain(*last.state.server.adapter.factors.values()), *last.state.server.head.values()])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_client_that_breaks_costs_no_other_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With everybody else far behind it in growth, as for a client that sends 0, none of the others is left out."""
    config = make_config(
        rounds=2,
        clients={"per_round": 4},
        train={"client_learning_rates": [2e-2, 1e8, 2e-2, 1e30], "local_steps": 1},
        privacy=NOISY,
        server={"patience": 1},
    )
    said: list[str] = []
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path, None, said.append)
    assert [set(row["skipped"]) <= {3} for row in rows] == [True] * 3
    assert not any("keeps its state" in line for line in said)
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_private_heads_that_are_frozen_stay(tmp_path: Path) -> None:
    config = make_config(rounds=1, clients={"per_round": 4}, train={"head": "freeze"}, privacy=NOISY)
    with adapted(config, TinyClassifier(), ()) as shared:
        federation = Federation(config, make_data(), shared, pytest.fail)
        *_, last = federation.play(federation.beginning())
    assert_equal(dict(last.state.server.head), {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"privacy": {"noise_multiplier": 1.0}}, "privacy.clip is 0.0, and noise is asked for"),
        ({"privacy": {"clip": 1.0}}, "one of the two should be above 0"),
        (
            {"privacy": {"clip": 1.0, "noise_multiplier": 1.0, "target_epsilon": 3.0}},
            "one of the two should be above 0",
        ),
        ({"privacy": {"clip": 1.0, "target_epsilon": 3.0}}, "privacy.target_rounds is 0 and rounds 40"),
        ({"method": "flora"}, "method is 'flora' and privacy.clip 1: the sensitivity of other methods"),
        ({"adapter": {"selection": "gradient"}}, "'random' or 'shared-random' or 'first' would be right"),
        ({"adapter": {"selection": "largest-norm"}}, "adapter.selection is 'largest-norm'"),
        ({"train": {"weighting": "samples"}}, "numbers of samples are data"),
        ({"train": {"head": "personal"}}, "the mean of personal heads would be without noise"),
        ({"server": {"aggregation": "median"}}, "the sensitivity of other rules is another"),
        ({"server": {"max_update_norm": 0.5}}, "privacy.clip bounds all that a client moves; 0.0 would be right"),
        ({"server": {"min_updates": 2}}, "how many updates are usable depends on data"),
        ({"clients": {"memory_mib": [4.0]}}, "the ranks that fit depend on clients' rows"),
        (
            {"checkpoint_every": 2, "privacy": {"clip": 1.0, "noise_multiplier": 1.0, "secret_noise": True}},
            "1 would be",
        ),
    ],
)
def test_what_would_break_the_guarantee_is_refused(changes: dict[str, Any], said: str) -> None:
    table = {"privacy": {"clip": 1.0, "noise_multiplier": 1.0}, **changes}
    with pytest.raises(FedError, match=said):
        parse(table, "here")
