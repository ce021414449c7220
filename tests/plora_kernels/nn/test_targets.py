"""Which modules are adapted: none that is saved whole, and what cannot be adapted is named, not passed over."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import plora_kernels as pk
from plora_kernels.nn.targets import shortened
from tests.support.models import adapted, tiny_bert, tiny_distilbert, tiny_llama

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ROUTED = {**SIZES, "num_key_value_heads": 2}


def build(name: str, **options: object) -> nn.Module:
    """Return a tiny model of transformers' class `name`."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).eval()


def roberta() -> nn.Module:
    return build("RobertaForSequenceClassification", **SIZES, max_position_embeddings=40, pad_token_id=0)


def electra() -> nn.Module:
    return build("ElectraForSequenceClassification", **SIZES, embedding_size=16)


def tagger() -> nn.Module:
    return build("BertForTokenClassification", **SIZES)


def answerer() -> nn.Module:
    return build("BertForQuestionAnswering", **SIZES)


def silently(model: nn.Module, **options: object) -> pk.Injected:
    """Inject, with every warning of this package an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pk.PLoRAWarning)
        return pk.inject(model, pk.PLoRAConfig(rank=2, **options))


HEADS = [
    (roberta, "SEQ_CLS", ("classifier",)),
    (electra, "SEQ_CLS", ("classifier",)),
    (tiny_distilbert, "SEQ_CLS", ("pre_classifier", "classifier")),
    (tiny_bert, "SEQ_CLS", ("classifier",)),
    (tagger, "TOKEN_CLS", ("classifier",)),
    (answerer, "QUESTION_ANS", ("qa_outputs",)),
]


@pytest.mark.parametrize(("model", "task", "head"), HEADS, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("targets", ["all-linear", r".*(query|q_lin|dense|out_proj|lin1)"], ids=["all", "regex"])
def test_a_head_of_the_task_is_trained_whole_and_never_adapted(
    model: type, task: str, head: tuple[str, ...], targets: str, tmp_path: Path
) -> None:
    base = model()
    fresh = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.PLoRAWarning)  # of the expression, which also matches the heads
        handle = adapted(base, targets, task_type=task)
    assert handle.saved_modules == head
    assert not any(name.startswith(head) for name in handle.layers)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    whole = {name for name, _ in base.named_parameters() if name.startswith(tuple(f"{name}." for name in head))}
    assert trained == whole | {f"{name}.lora_{side}" for name in handle.layers for side in "AB"}
    ids = torch.arange(12).view(2, 6) + 5
    with torch.no_grad():
        for parameter in (p for name, p in base.named_parameters() if name in whole):
            parameter.add_(torch.randn_like(parameter))
        expected = base(input_ids=ids)[0]
        pk.save_peft(handle, tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=ids)[0], expected)


@pytest.mark.parametrize(("model", "task", "_head"), HEADS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_is_trained_is_what_peft_trains(model: type, task: str, _head: tuple[str, ...]) -> None:
    targets = ["query"] if model is not tiny_distilbert else ["q_lin"]
    handle = silently(model(), target_modules=targets, task_type=task)
    theirs = get_peft_model(model(), LoraConfig(r=2, target_modules=targets, task_type=task))
    names = [name.removeprefix("base_model.model.") for name, p in theirs.named_parameters() if p.requires_grad]
    whole = {name.replace(".modules_to_save.default", "") for name in names if "lora_" not in name}
    assert {name for name, p in handle.model.named_parameters() if p.requires_grad and "lora_" not in name} == whole


def test_a_listed_target_in_the_tasks_head_is_named() -> None:
    with pytest.warns(
        pk.PLoRAWarning, match="no adapter for classifier: task_type 'SEQ_CLS' trains classifier in full"
    ):
        handle = pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["dense", "classifier"], task_type="SEQ_CLS"))
    assert handle.saved_modules == ("classifier",)
    assert "classifier" not in handle.layers
    with pytest.warns(pk.PLoRAWarning, match=r"no adapter for classifier\.dense: "):
        pk.inject(roberta(), pk.PLoRAConfig(target_modules=["dense"], task_type="SEQ_CLS"))
    with pytest.raises(pk.TargetError, match="matches only modules that task_type 'SEQ_CLS' trains in full"):
        pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["classifier"], task_type="SEQ_CLS"))


def test_a_target_that_the_configuration_gives_up_itself_is_an_error() -> None:
    for options in ({"modules_to_save": ["classifier"]}, {"exclude_modules": ["classifier"]}):
        model = tiny_bert()
        with pytest.raises(pk.TargetError, match="'classifier' leaves none: modules_to_save or exclude_modules names"):
            pk.inject(model, pk.PLoRAConfig(target_modules=["query", "classifier"], **options))
        assert all(parameter.requires_grad for parameter in model.parameters())
    # A part of what a name matches may be given up without a word.
    assert silently(roberta(), target_modules=["dense"], modules_to_save=["classifier"]).layers


def test_modules_to_save_are_ends_of_names_as_in_peft() -> None:
    handle = silently(tiny_distilbert(), target_modules="all-linear", modules_to_save=["classifier"])
    assert handle.saved_modules == ("pre_classifier", "classifier")
    assert not any("classifier" in name for name in handle.layers)


class Subclass(nn.Linear):
    pass


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 4))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Subclass(4, 4), r"1 \(Subclass instead of a plain nn\.Linear\)"),
        (Conv1D(4, 4), r"1 \(Conv1D instead of a plain nn\.Linear\)"),
        (Experts(), r"1 \(Experts holds the weights itself\)"),
        (Router(), r"1 \(Router holds the weights itself\)"),
        (nn.MultiheadAttention(4, 2), r"1\.out_proj \(NonDynamicallyQuantizableLinear instead of"),
    ],
    ids=["subclass", "conv1d", "experts", "router", "attention"],
)
def test_all_linear_names_what_it_leaves_out(module: nn.Module, text: str) -> None:
    with pytest.warns(
        pk.PLoRAWarning, match=f"^target_modules is 'all-linear', but these .* no adapter: {text}"
    ) as said:
        handle = pk.inject(nn.Sequential(nn.Linear(4, 4), module), pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    assert list(handle.layers) == ["0"]
    assert len(said) == 1
    assert said[0].filename == __file__
    with pytest.raises(
        pk.TargetError, match=f"no nn.Linear besides its output layer that can have an adapter; left out: {text}"
    ):
        pk.inject(nn.Sequential(nn.ReLU(), module), pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    silently(nn.Sequential(nn.Linear(4, 4), module), target_modules="all-linear", exclude_modules=r"1|1\.out_proj")


@pytest.mark.parametrize(
    "module", [nn.Embedding(4, 4), nn.Conv1d(4, 4, 2), nn.LayerNorm(4), nn.LSTM(4, 4), nn.Bilinear(4, 4, 4)], ids=str
)
def test_all_linear_is_silent_about_what_peft_leaves_out_too(module: nn.Module) -> None:
    assert list(silently(nn.Sequential(nn.Linear(4, 4), module), target_modules="all-linear").layers) == ["0"]


@pytest.mark.parametrize(
    ("name", "options", "left_out"),
    [
        ("MixtralForCausalLM", {**ROUTED, "num_local_experts": 4}, ["mlp.gate", "mlp.experts"]),
        (
            "Qwen2MoeForCausalLM",
            {**ROUTED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
            ["mlp.gate", "mlp.experts"],
        ),
        ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, **SIZES}, []),
        ("T5ForConditionalGeneration", {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}, []),
        ("ViTForImageClassification", {**SIZES, "image_size": 16, "patch_size": 8}, []),
        ("DebertaV2ForSequenceClassification", {**SIZES, "relative_attention": True}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_all_linear_is_that_of_peft_but_for_what_it_names(name: str, options: dict, left_out: list[str]) -> None:
    model = build(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules="all-linear")).base_model
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules="all-linear"))
    assert set(handle.layers) == set(theirs.targeted_module_names)
    said = " ".join(str(one.message) for one in caught if issubclass(one.category, pk.PLoRAWarning))
    assert [name for name in left_out if f".{name} " in said] == left_out
    assert bool(said) == bool(left_out)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GPT2LMHeadModel", {"vocab_size": 60, "n_embd": 32, "n_layer": 1, "n_head": 4}),
        ("FalconForCausalLM", {key: value for key, value in SIZES.items() if key != "intermediate_size"}),
    ],
)
def test_a_model_without_plain_linears_is_refused_by_their_class(name: str, options: dict) -> None:
    kind = "Conv1D" if name.startswith("GPT2") else "FalconLinear"
    with pytest.raises(
        pk.TargetError, match=rf"no nn\.Linear besides its output layer that .*{kind} instead of a plain"
    ):
        pk.inject(build(name, **options), pk.PLoRAConfig(target_modules="all-linear"))


def test_patterns_and_exclusions_that_match_nothing_are_named() -> None:
    for options, message in (
        ({"rank_pattern": {"qeury": 2}}, "rank_pattern has keys that match no targeted module: 'qeury'"),
        ({"alpha_pattern": {"value": 2.0}}, "alpha_pattern has keys that match no targeted module: 'value'"),
        ({"exclude_modules": ["layer.7"]}, r"exclude_modules \['layer.7'\] matches no module"),
    ):
        with pytest.warns(pk.PLoRAWarning, match=message):
            pk.inject(tiny_bert(), pk.PLoRAConfig(target_modules=["query"], **options))


def test_a_layer_under_two_names_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    with pytest.warns(pk.PLoRAWarning, match=r"1 shared modules have an adapter .* in PEFT: 0 is also 2"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0"]))
    block = nn.Sequential(nn.Linear(4, 4))
    handle = silently(nn.Sequential(block, block), target_modules=["0"], exclude_modules=r"\d")
    assert handle.model[1][0] is handle.layers["0.0"]


def test_the_output_layer_is_left_out_and_all_linear_is_read_in_any_case() -> None:
    assert "lm_head" not in silently(tiny_llama(), target_modules="All-Linear").layers


def test_names_on_one_line() -> None:
    assert shortened(["a.0.q", "a.1.q", "a.11.k2", "b"]) == "a.*.q (2), a.11.k2, b"
    assert shortened([f"m{letter}" for letter in "abcdefgh"], most=2) == "ma, mb and 6 more"
