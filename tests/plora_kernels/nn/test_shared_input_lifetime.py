"""Lifetime of joint projections and their graphs; layers that stop sharing, copies, state dicts and files."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plora_kernels as pk
from plora_kernels.nn import shared_input
from plora_kernels.nn.shared_input import SharedInput
from tests.support.attention import make
from tests.support.equality import assert_equal
from tests.support.models import adapted, tiny_bert

TOKENS = torch.arange(24).reshape(2, 12)


def test_outputs_nobody_takes_live_no_longer_than_the_input() -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)
    waiting = [weakref.ref(waiting.computed.y) for waiting in model.q_proj.shared._round._waiting.values()]
    assert [w() is not None for w in waiting] == [True, True]
    del x
    assert [w() for w in waiting] == [None, None]


def test_no_graph_outlives_its_step() -> None:
    model, _ = make(True)
    h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True) * 2
    gc.disable()  # objects that only the garbage collector would free count as alive
    try:
        y = model.q_proj(h)
        nodes = [weakref.ref(y.grad_fn)]
        y = y.sum() + model.k_proj(h).sum() + model.v_proj(h).sum()
        nodes.append(weakref.ref(h))
        y.backward()
        del y, h
        assert [node() for node in nodes] == [None, None]
        h = torch.randn(3, 7, dtype=torch.float64, requires_grad=True) * 2
        y = model.q_proj(h)  # the other two layers are not called
        held = weakref.ref(h)
        del y, h
        assert held() is None
    finally:
        gc.enable()


def test_layers_that_do_not_share_their_input_part(launches: list[int]) -> None:
    model, _ = make(True)
    for _ in range(6):
        x = torch.randn(3, 7, dtype=torch.float64)
        model.q_proj(x), model.k_proj(x + 1), model.v_proj(x)
    assert len(launches) == shared_input.MISSES_ALLOWED


def test_a_round_that_is_completed_forgives_those_that_were_not(launches: list[int]) -> None:
    model, _ = make(True)
    for _ in range(4):
        model.q_proj(torch.randn(3, 7, dtype=torch.float64))
        model.q_proj(torch.randn(3, 7, dtype=torch.float64))
        model(torch.randn(3, 7, dtype=torch.float64))
    assert len(launches) == 12


def test_layers_that_drop_run_alone(launches: list[int]) -> None:
    model, handle = make(fused=True)
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    for layer in handle.layers.values():
        layer.dropout, layer.dropout_seed = 0.5, 3
    model(x)
    assert launches == []
    model.eval()(x)
    assert launches == [3]


def test_copies_form_groups_of_their_own(launches: list[int]) -> None:
    model, handle = make(True)
    handle.select([0], "frozen")
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)  # the other two layers have not been called yet
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        launches.clear()
        torch.testing.assert_close(copied(x), expected)
        assert launches == [3]
        assert copied.q_proj.shared is copied.v_proj.shared is not model.q_proj.shared
        with torch.no_grad():
            copied.k_proj.lora_B.zero_()
        assert torch.equal(model(x), expected)


def test_a_layer_copied_by_itself_copies_no_other_and_runs_alone(launches: list[int]) -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    copied = copy.deepcopy(model.q_proj)
    torch.testing.assert_close(copied(x), model.q_proj(x))
    assert launches == [3]
    assert copied.shared._members[1] is None


def test_moving_the_model_forgets_an_open_round() -> None:
    model, _ = make(True)
    x = torch.randn(3, 7, dtype=torch.float64)
    model.q_proj(x)
    model.float()
    torch.testing.assert_close(model(x.float()).double(), make(False)[0](x), rtol=1e-4, atol=1e-4)


def test_states_files_and_restoring_are_as_without(tmp_path: Path) -> None:
    plain = tiny_bert()
    original = {name: value.clone() for name, value in plain.state_dict().items()}
    targets, model, twin = ["query", "key", "value"], copy.deepcopy(plain), copy.deepcopy(plain)
    handle = adapted(model, targets, fuse_projections=True)
    assert list(model.state_dict()) == list(adapted(twin, targets).model.state_dict())
    expected = model(input_ids=TOKENS).logits
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(input_ids=TOKENS).logits, expected)
    model.save_pretrained(tmp_path / "model")  # safetensors refuses tensors that share memory
    pk.save_peft(handle, tmp_path / "adapter")
    loaded = pk.load_peft(copy.deepcopy(plain), tmp_path / "adapter").model
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected)
    restored = handle.restore()
    assert all(type(restored.get_submodule(name)) is nn.Linear for name in handle.layers)
    assert_equal(restored.state_dict(), original)


def test_another_thread_in_between_leaves_each_its_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make(True)
    alone, _ = make(False)
    mine, theirs = (torch.randn(3, 7, dtype=torch.float64) for _ in range(2))
    found: list[Tensor] = []

    def put(shared: SharedInput, name: str, value: object) -> None:
        object.__setattr__(shared, name, value)
        if name == "_round" and value is not None and threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: found.append(model.k_proj(theirs)))
            other.start()
            other.join()

    monkeypatch.setattr(SharedInput, "__setattr__", put)
    y = model.q_proj(mine)
    monkeypatch.undo()
    torch.testing.assert_close(y, alone.q_proj(mine))
    torch.testing.assert_close(found[0], alone.k_proj(theirs))
