"""Linears whose weight other code reads are refused by name; reads that do not matter are not."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import plora_kernels as pk

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
SPEECH = {
    **{"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}


def build(name: str, **options: object) -> nn.Module:
    """Return a tiny model of transformers' class `name`."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).eval()


READ = {  # the class, its configuration, and the children whose weight it reads
    "WavLMModel": ({"hidden_size": 32, "num_hidden_layers": 1, **HEADS, **SPEECH}, ["q_proj", "k_proj", "v_proj"]),
    "MambaForCausalLM": ({**SIZES, "state_size": 4}, ["out_proj", "x_proj", "dt_proj"]),
    "Mamba2ForCausalLM": ({**SIZES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}, ["out_proj"]),
    "FalconMambaForCausalLM": ({**SIZES, "state_size": 4}, ["out_proj", "x_proj", "dt_proj"]),
    "JambaForCausalLM": (
        {**SIZES, **HEADS, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
        ["dt_proj"],
    ),
    "FalconH1ForCausalLM": (
        {
            **{**SIZES, **HEADS, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
            **{"mamba_n_groups": 1, "mamba_d_state": 4},
        },
        ["out_proj"],
    ),
    "MobileBertForMaskedLM": (
        {**SIZES, **HEADS, "embedding_size": 16, "intra_bottleneck_size": 16},
        ["cls.predictions.dense"],
    ),
    "RwkvForCausalLM": ({**SIZES, "intermediate_size": 48}, ["attention.output", "feed_forward.value"]),
}


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in READ for target in READ[name][1]], ids=str)
def test_models_that_read_a_weight_are_refused_by_name(name: str, target: str) -> None:
    model = build(name, **READ[name][0])
    with pytest.raises(pk.TargetError, match=rf"'\S*{target}' cannot be adapted: \w+\.\w+ reads the weight past the"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=[target]))
    assert not any(isinstance(module, pk.FusedPLoRALinear) for module in model.modules())


@pytest.mark.parametrize("name", READ)
def test_all_linear_leaves_them_out_and_names_them(name: str) -> None:
    model = build(name, **READ[name][0])
    with pytest.warns(pk.PLoRAWarning, match="get no adapter") as notices:
        handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    for target in READ[name][1]:
        assert not any(layer.endswith(target) for layer in handle.layers)
        assert target in str(notices[0].message)
    assert handle.layers


def test_detrs_attention_map() -> None:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    kind = pk.PLoRAConfig(rank=2, target_modules=["k_proj"])
    with pytest.raises(pk.TargetError, match=r"'k_proj' cannot be adapted: DetrMHAttentionMap\.forward"):
        pk.inject(DetrMHAttentionMap(8, 2), kind)
    pk.inject(DetrMHAttentionMap(8, 2), pk.PLoRAConfig(rank=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        *((name, T5, "wo") for name in ("T5EncoderModel", "UMT5EncoderModel", "LongT5EncoderModel", "MT5EncoderModel")),
        ("BloomModel", {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "dense"),
        ("BloomModel", {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 4}, "dense_4h_to_h"),
        ("DebertaModel", {**SIZES, **HEADS, "relative_attention": True}, "in_proj"),
        ("MambaModel", {**SIZES, "state_size": 4}, "in_proj"),
        ("WavLMModel", READ["WavLMModel"][0], "intermediate_dense"),
        ("RwkvModel", {**SIZES, "intermediate_size": 48, "rescale_every": 0}, "attention.output"),
    ],
    ids=str,
)
def test_reads_of_a_dtype_or_of_no_use_are_not_refused(name: str, options: dict, target: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", pk.PLoRAWarning)
        assert pk.inject(build(name, **options), pk.PLoRAConfig(rank=2, target_modules=[target])).layers


def test_a_setting_decides_whether_bloom_reads_its_weights() -> None:
    options = {"vocab_size": 60, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    model = build("BloomModel", **options, pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(pk.TargetError, match=r"BloomMLP\.forward reads the weight"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["dense_4h_to_h"]))


def project(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def call(x: Tensor, layer: nn.Linear) -> Tensor:
    return layer(x)


class Block(nn.Module):
    """The parts of the modules below; `read` is the target."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.other, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.exact = False


class Plainly(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight)


class InATuple(Block):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.read.weight, self.read.bias
        return F.linear(x, weight, bias)


class ByAName(Block):
    def forward(self, x: Tensor) -> Tensor:
        layer = self.read
        return x @ layer.weight.t()


class InALoop(Block):
    def forward(self, x: Tensor) -> Tensor:
        return sum(F.linear(x, layer.weight) for layer in (self.read, self.other))


class ByAFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return project(x, layer=self.read)


class ByAMethod(Block):
    def apply_to(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(x, self.read)


class ByAProperty(Block):
    @property
    def matrix(self) -> Tensor:
        return torch.cat([self.read.weight, self.other.weight])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)


class ByGetattr(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self.read, "weight"))  # noqa: B009 (what is tested)


class InEvaluation(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.read(x)
        return F.linear(x, self.read.weight)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read.weight)


class Inherited(Plainly):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FromOutside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.linear(x, block.read.weight)
        return x


class OfAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read[0].weight)


READERS = [Plainly, InATuple, ByAName, InALoop, ByAFunction, ByAMethod, ByAProperty, ByGetattr, InEvaluation, Decorated]


@pytest.mark.parametrize("kind", [*READERS, Inherited, FromOutside, OfAList])
def test_every_way_to_read_a_weight_is_found(kind: type[nn.Module]) -> None:
    with pytest.raises(
        pk.TargetError, match=r"read(\.0)?' cannot be adapted: \w+\.\w+ reads the weight past the layer"
    ):
        pk.inject(kind(), pk.PLoRAConfig(rank=2, target_modules=r".*read(\.0)?" if kind is OfAList else ["read"]))


def test_a_switch_that_a_method_turns_is_no_setting() -> None:
    with pytest.raises(pk.TargetError, match=r"BySetting\.forward reads the weight"):
        pk.inject(BySwitch(), pk.PLoRAConfig(rank=2, target_modules=["read"]))


def test_a_forward_that_was_put_on_an_instance_is_looked_at_too() -> None:
    model = Block()
    model.forward = Plainly.forward.__get__(model)  # type: ignore[method-assign]
    with pytest.raises(pk.TargetError, match=r"Block\.forward reads the weight"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["read"]))


class OfItsDtype(Block):
    def forward(self, x: Tensor) -> Tensor:
        dtype, device = self.read.weight.dtype, self.read.weight.device
        x = x.to(device, dtype) if isinstance(self.read.weight, Tensor) else x.to(self.other.weight)
        return self.read(x.reshape(-1, self.read.weight.shape[1]))


class ByANameForItsDtype(Block):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.read.weight
        again: Tensor = self.read.weight
        return self.read(x.to(weight.dtype).to(again.device))


class OfAnotherModule(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.read(x) * self.norm.weight + F.linear(x, self.other.weight)


class Called(Block):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.read, self.other):
            x = call(x, layer)
        return x


class BySetting(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return F.linear(x, self.read.weight)
        return self.read(x)


class BySwitch(BySetting):
    def fuse(self) -> None:
        self.exact = True


class ToInitialise(Block):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.read.weight)

    def tie(self) -> None:
        self.read.weight = self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)


class Overridden(Plainly):
    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)


@pytest.mark.parametrize(
    "kind", [OfItsDtype, ByANameForItsDtype, OfAnotherModule, Called, BySetting, ToInitialise, Overridden]
)
def test_what_does_not_read_its_values_is_adapted(kind: type[Block]) -> None:
    model, x = kind(), torch.ones(2, 4)
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["read"]))
    nn.init.normal_(handle.layers["read"].lora_B)
    before = model(x)
    handle.select([0])
    torch.testing.assert_close(model(x), before)


def test_a_read_that_cannot_be_seen_shows_in_the_first_pass() -> None:
    class Hidden(Block):
        def forward(self, x: Tensor) -> Tensor:
            weight, bias, *_ = self.read.parameters()
            return F.linear(x, weight, bias)

    model = Hidden()
    pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["read"]))
    with pytest.warns(pk.PLoRAWarning, match="did not call these adapted layers: read; "):
        model(torch.ones(2, 4))
