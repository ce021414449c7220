"""Layers over bitsandbytes' linears: as exact as PEFT's over the same, alone and in whole models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.models import tiny_llama
from tests.support.quantized import quantized_4bit, quantized_8bit

KINDS = {
    "nf4": {"quant_type": "nf4"},
    "nf4 twice": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4 in bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "int8": None,
    "int8 with outliers": {"threshold": 2.0},
}
# The dtype of x, and the compute_dtype of 4-bit layers.
DTYPES = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16), (torch.bfloat16, None),
]  # fmt: skip


def linear_of(bnb: Any, kind: str, compute: torch.dtype | None, k: int = 128, n: int = 96) -> nn.Linear:
    plain, options = nn.Linear(k, n), KINDS[kind]
    if kind.startswith("int8"):
        return quantized_8bit(bnb, plain, **(options or {}))
    return quantized_4bit(bnb, plain, compute_dtype=compute, **(options or {}))


def exact(weight: Tensor, bias: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dy: Tensor) -> list[Tensor]:
    """Return y, dx, dA and dB in float64."""
    weight, bias, x, A, B, dy = (t.detach().double() for t in (weight, bias, x, A, B, dy))
    s, ds = x @ A.T, dy @ B
    return [x @ weight.T + bias + scale * s @ B.T, dy @ weight + scale * ds @ A, scale * ds.T @ x, scale * dy.T @ s]


def weight_of(bnb: Any, linear: Any) -> Tensor:
    """Return the weight in float32 by the library's own functions."""
    if isinstance(linear, bnb.nn.Linear8bitLt):
        scales = linear.weight.SCB if linear.state.SCB is None else linear.state.SCB
        return linear.weight.data.float() * (scales / 127)[:, None]
    state = copy.copy(linear.weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(linear.weight.data, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "compute"), DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 70])
def test_it_is_as_exact_as_peft(bnb: Any, kind: str, dtype: torch.dtype, compute: torch.dtype, rows: int) -> None:
    torch.manual_seed(1)
    linear = linear_of(bnb, kind, compute)
    weight, bias = weight_of(bnb, linear), linear.bias.detach().clone()
    theirs = nn.Sequential(copy.deepcopy(linear))
    theirs.is_loaded_in_4bit, theirs.is_loaded_in_8bit = not kind.startswith("int8"), kind.startswith("int8")
    wrapped = get_peft_model(theirs, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    peft = wrapped.base_model.model[0]
    assert type(peft).__module__ == "peft.tuners.lora.bnb"
    handle = pk.inject(nn.Sequential(linear), pk.PLoRAConfig(rank=8, alpha=16.0, target_modules=["0"]))
    layer = handle.layers["0"]
    A, B = torch.randn(8, 128) / 128**0.5, torch.randn(96, 8) / 4
    layer.set_factors(A, B)
    with torch.no_grad():
        peft.lora_A.default.weight.copy_(A)
        peft.lora_B.default.weight.copy_(B)
    x, dy = torch.randn(2, rows, 128).to(dtype), torch.randn(2, rows, 96).to(dtype)
    want = exact(weight, bias, x.flatten(0, 1), A, B, 2.0, dy.flatten(0, 1))
    errors = []
    for module, factors in (
        (layer, (layer.lora_A, layer.lora_B)),
        (peft, (peft.lora_A.default.weight, peft.lora_B.default.weight)),
    ):
        given = x.clone().requires_grad_()
        y = module(given)
        assert y.dtype is dtype
        found = [y, *torch.autograd.grad(y, [given, *factors], dy)]
        assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
        errors.append([(t.double().reshape(e.shape) - e).norm().item() for t, e in zip(found, want, strict=True)])
    for name, ours, of_peft, value in zip(("y", "dx", "dA", "dB"), *errors, want, strict=True):
        # PEFT's branch is float32 throughout. Ours rounds S and dS to x's dtype: as if each result were rounded once.
        floor = max(1e-6, torch.finfo(dtype).eps / 2) * value.norm().item()
        assert ours <= max(2 * of_peft, floor), f"{name}: {ours:.3g} against PEFT's {of_peft:.3g}"


@pytest.mark.parametrize("kind", ["nf4 twice", "int8"])
def test_the_library_s_evaluation_on_cpu_does_not_change_results(bnb: Any, kind: str) -> None:
    linear = linear_of(bnb, kind, torch.bfloat16)
    weight = weight_of(bnb, linear)
    with torch.no_grad():
        linear.eval()(torch.randn(1, 128).bfloat16())  # may repack the weight, with its scales rounded
    layer = pk.inject(nn.Sequential(linear), pk.PLoRAConfig(rank=4, target_modules=["0"])).layers["0"].eval()
    x = torch.randn(5, 128).bfloat16()
    before = copy.deepcopy(layer.base_layer.weight.data)
    with torch.no_grad():
        y, again = layer(x), layer(x[:1])
    expected = x.double() @ weight.double().T + linear.bias.double()
    # What repacking has rounded, by 2⁻⁹, stays so.
    assert (y - expected).norm() <= 0.01 * expected.norm()
    assert (again - expected[:1]).norm() <= 0.01 * expected.norm()
    assert (layer.base_layer.weight.data.shape == before.shape) or kind != "int8"
    untouched = layer.base_layer.weight.data.clone()
    with torch.no_grad():
        layer(x[:1])
    assert torch.equal(layer.base_layer.weight.data, untouched)  # our evaluation repacks nothing


def test_the_product_for_few_rows_is_the_library_s(bnb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU. On CPU the kind declines, because the library dequantises there; here it is asked all the same."""
    from plora_kernels.nn.quantized.bitsandbytes import FourBit

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    for kind in ("nf4", "nf4 twice", "fp4"):
        linear = linear_of(bnb, kind, torch.float32)
        x = torch.randn(2, 128)
        assert FourBit().product(linear, x, linear.bias) is None
        y = FourBit().product(linear, x.as_subclass(OnGpu), linear.bias)
        torch.testing.assert_close(
            torch.as_tensor(y).as_subclass(Tensor), x @ weight_of(bnb, linear).T + linear.bias, rtol=1e-5, atol=1e-5
        )


def test_a_cast_that_would_destroy_a_packed_weight_is_refused(bnb: Any) -> None:
    linear = linear_of(bnb, "nf4 in bfloat16", torch.float32)
    model, x = nn.Sequential(linear), torch.randn(3, 128)
    pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"]))
    y = model(x)
    with pytest.raises(pk.StateError, match=r"packed as torch\.bfloat16 .* a cast to torch\.float16 would destroy it"):
        model.half()
    model.to("cpu")
    assert torch.equal(model(x), y)


def test_a_weight_packed_as_numbers_that_are_nan_loads_its_own_state(bnb: Any) -> None:
    model = nn.Sequential(linear_of(bnb, "nf4 in bfloat16", torch.float32))
    pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"]))
    state = copy.deepcopy(model.state_dict())
    assert state["0.weight"].isnan().any()
    model.load_state_dict(state)
    state["0.weight"].view(torch.uint8)[0] ^= 1
    with pytest.raises(RuntimeError, match=r"'0\.weight' is not what the quantised layer holds"):
        model.load_state_dict(state)


def test_the_operators_refuse_a_packed_weight(bnb: Any) -> None:
    weight, A, B = linear_of(bnb, "nf4", None).weight, torch.ones(2, 128), torch.ones(96, 2)
    for call in (
        lambda: pk.fold_(weight, A, B, []),
        lambda: pk.plora_linear(torch.ones(3, 128), weight, A, B),
        lambda: pk.plora_linear(torch.ones(3, 128), weight, A[None], B[None], groups=[0, 3]),
    ):
        with pytest.raises(pk.DTypeError, match=r"weight is torch\.uint8; .* frozen form of `inject` alone"):
            call()


def test_what_is_not_quantised_yet_is_refused(bnb: Any) -> None:
    for linear in (
        bnb.nn.Linear4bit(64, 64), bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), bnb.nn.Linear8bitLt(64, 64),
    ):  # fmt: skip
        for targets in ("all-linear", ["0"]):
            with pytest.raises(pk.TargetError, match=r"'0' is a Linear.bit.* that is not quantised yet"):
                pk.inject(nn.Sequential(linear), pk.PLoRAConfig(rank=2, target_modules=targets))


def llama(bnb: Any, kind: str) -> nn.Module:
    torch.manual_seed(2)
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = {"quant_type": "nf4", "compute_dtype": torch.float32}
            model.set_submodule(
                name, quantized_8bit(bnb, module) if kind == "int8" else quantized_4bit(bnb, module, **four)
            )
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_go_to_peft_and_come_back(bnb: Any, kind: str, tmp_path: Any) -> None:
    tokens = torch.randint(0, 60, (2, 9))
    handle = pk.inject(llama(bnb, kind), pk.PLoRAConfig(rank=4, target_modules="all-linear"))
    assert len(handle.layers) == 14
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    handle.select([1, 2], unselected="frozen")
    logits = handle.model.train()(tokens).logits
    pk.save_peft(handle, tmp_path / "ours")
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(llama(bnb, kind), tmp_path / "ours").train()
    modules = [m for m in theirs.modules() if type(m).__module__ == "peft.tuners.lora.bnb"]
    assert len(modules) == 14
    torch.testing.assert_close(theirs(tokens).logits, logits, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = pk.load_peft(llama(bnb, kind), tmp_path / "theirs")
    assert set(back.layers) == set(handle.layers)
    assert torch.equal(back.model.train()(tokens).logits, logits)
    base = back.restore()
    torch.testing.assert_close(
        base.train()(tokens).logits, llama(bnb, kind).train()(tokens).logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_state_dicts_and_copies_of_a_model(bnb: Any, kind: str) -> None:
    tokens = torch.randint(0, 60, (2, 9))
    plain = llama(bnb, kind).train()  # in evaluation the library repacks layers without an adapter, and rounds scales
    keys = set(plain.state_dict())
    handle = pk.inject(plain, pk.PLoRAConfig(rank=4, target_modules=["q_proj", "down_proj"]))
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B, std=0.1)
    logits = plain(tokens).logits
    state = copy.deepcopy(plain.state_dict())
    assert {key for key in state if "lora_" not in key} == keys
    copied = copy.deepcopy(plain)
    assert torch.equal(copied(tokens).logits, logits)
    for layer in handle.layers.values():
        layer.reset_adapter()
    assert not torch.equal(plain(tokens).logits, logits)
    for name, layer in handle.layers.items():  # layers without an adapter load as the library has it
        part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        layer.load_state_dict(part)
        assert torch.equal(layer.lora_B, part["lora_B"])
        scales = "SCB" if kind == "int8" else "weight.absmax"
        part[scales] = part[scales] + 1
        with pytest.raises(RuntimeError, match=rf"'{scales}' is not what the quantised layer holds"):
            layer.load_state_dict(part)
    assert torch.equal(plain(tokens).logits, logits)


def test_models_that_transformers_quantises(bnb: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    for config in (four, BitsAndBytesConfig(load_in_8bit=True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
            )
        handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules="all-linear"))
        assert len(handle.layers) == 14
        handle.select([0], unselected="frozen")
        tokens = torch.randint(0, 60, (2, 24))
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        for layer in handle.layers.values():
            assert layer.lora_B.grad.dtype is torch.float32
            assert layer.lora_B.grad.abs().sum() > 0
        handle.restore()


def test_the_candidate_kernel_decodes_the_library_s_nf4(bnb: Any) -> None:
    from bench.audit.nf4_matmul import nf4_matmul

    linear = linear_of(bnb, "nf4", None)
    state = linear.weight.quant_state
    x, side, lora_B = torch.randn(5, 128), torch.zeros(5, 1), torch.zeros(96, 1)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed, scales = linear.weight.data.view(96, 64), absmax.view(96, 2)
    y = nf4_matmul(x, packed, scales, state.code, side, lora_B, 1.0, block_m=16, block_n=32)
    torch.testing.assert_close(y, x @ weight_of(bnb, linear).T, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # transformers' and the library's own
@pytest.mark.parametrize("bits", [4, 8])
def test_a_trainer_takes_it_and_resumes_from_its_adapter(bnb: Any, tmp_path: Any, bits: int) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    class AdapterTrainer(pk.AdapterCheckpoints, Trainer):
        pass

    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    rows = [{"input_ids": (ids := torch.arange(12) * (row + 3) % 60), "labels": ids} for row in range(4)]
    losses = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-1")):
        torch.manual_seed(0)
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
        handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules="all-linear"))
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=3, save_steps=1, logging_steps=1, learning_rate=0.05, report_to=[],
            disable_tqdm=True, use_cpu=True, per_device_train_batch_size=2,
        )  # fmt: skip
        trainer = AdapterTrainer(handle, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert not model._hf_peft_config_loaded
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def bits_of(value: object) -> object:
    """Return a tensor's bits, or what else a state dict holds; packed weights that pass for numbers may be NaN."""
    return value.reshape(-1).view(torch.uint8).tolist() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_it_computes_with_the_dequantised_weight_and_nothing_is_repacked(bnb: Any, kind: str) -> None:
    linear = linear_of(bnb, kind, torch.float32)
    x, before = torch.randn(40, 128), {key: bits_of(value) for key, value in linear.state_dict().items()}
    expected = x @ weight_of(bnb, linear).T + linear.bias.float()
    handle = pk.inject(nn.Sequential(linear).eval(), pk.PLoRAConfig(rank=4, target_modules=["0"]))
    nn.init.normal_(handle.layers["0"].lora_B)
    with handle.disable(), torch.no_grad():
        torch.testing.assert_close(handle.model(x), expected)
    assert {key: bits_of(value) for key, value in handle.restore()[0].state_dict().items()} == before
