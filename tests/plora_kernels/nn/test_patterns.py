"""The check of regular expressions for names of modules."""

from __future__ import annotations

import random
import re
import time

import pytest

from plora_kernels.errors import ConfigError
from plora_kernels.nn.patterns import check_pattern
from tests.support.limits import WITHOUT_END

# From the documentation of PEFT and transformers, and from tools that write PEFT's configurations.
ORDINARY = [
    r".*\.(q|v)_proj",
    r"(a|b)?(\..*)?",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^model\.layers\.\d+\.mlp\.(up|down)_proj$",
    r"^(?!.*vision).*proj$",
    r"^((?!vision).)*$",
    r"^(?!.*(visual|vision_tower)).*\.(q_proj|k_proj)$",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp))",
    r"^(model\.language_model(?=\.).*\.(o_proj|k_proj|up_proj|q_proj|down_proj|v_proj|gate_proj))$",
    r".*\.layers\.(20|21|22|23|24|25)\..*(q|v)_proj",
    r".*\.layers\.(1?[0-9]|2[0-3])\.self_attn\.(q|k|v|o)_proj",
    r"(\w+\.)*q_proj",
    r"model.*\.(?:mlp|attn)(?:\.\w+)*",
    r"(?i).*attention.*query",
    r".*(?<!lm_head)",
    r"[^.]+\.[^.]+\.q_proj",
    r"(foo|bar){2}",
    r".*qkv|.*proj|.*fc1",
    "|".join(f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(80) for name in "qkvo"),
]
SLOW = [
    "(a+)+b",
    "(a*)*",
    "(a|a.)*b",
    "(.*x)*y",
    r"(\w+\s?)*$",
    "(?=(a+)+b).*",
    "(?:(?:(?=.))?[ab])+x",
    "(?>a+)+b",
    "((a{1,50}){1,50}){1,50}b",
    r"(a)(b\1|bb)*c",
    ".*.*.*.*.*x",
    "[a-z]*" * 6 + "1",
    "a?" * 30 + "a" * 30,
    "(a?){30}a{30}",
    "(?:a?){8}" * 8 + "b",
    "(?:){1000000000}",
    "x{99999999999999}",
    "a{5000}",
    "(" * 3000 + ")" * 3000,
    "(?i)" + "[\\0-\U0010ffff]" * 1000,
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_what_is_ordinary_for_names_of_modules_is_accepted(pattern: str) -> None:
    check_pattern(pattern, "target_modules")


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_that_takes_for_ever_is_refused_at_once_in_one_line(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="can take for ever to match: ") as refused:
        check_pattern(pattern, "target_modules")
    assert time.process_time() - began < WITHOUT_END
    assert str(refused.value).startswith("target_modules holds '")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_is_no_expression_or_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_pattern holds '\(', which is not a regular expression: missing \)"):
        check_pattern("(", "rank_pattern")
    with pytest.raises(ConfigError, match="50001 characters; at most 50000"):
        check_pattern("a" * 50_000 + "*", "rank_pattern")
    check_pattern("|".join(f"model.layers.{number}.q_proj" for number in range(3000)), "rank_pattern")


def _expression(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth == 0 or kind < 0.3:
        return draw.choice(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\.", "abc", "ab"])
    inner = [_expression(draw, depth - 1) for _ in range(3)]
    if kind < 0.5:
        return "".join(inner[:2])
    if kind < 0.65:
        return f"({'|'.join(inner)})"
    if kind < 0.93:
        return f"(?:{inner[0]}){draw.choice(['*', '+', '?', '{0,3}', '{2}', '{1,9}', '*?', '{2,}'])}"
    return draw.choice(["(?={})", "(?!{})", "({}|)"]).format(inner[0])


@pytest.mark.parametrize("tried", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_accepted_expression_is_matched_fast(tried: int) -> None:
    draw, accepted = random.Random(0), 0
    names = ["a" * 60, "ab" * 30, "aab" * 20, "a.b." * 15, "model.layers.10.self_attn.q_proj"]
    for _ in range(tried):
        pattern = "".join(_expression(draw, draw.randint(1, 4)) for _ in range(draw.randint(1, 4)))
        try:
            check_pattern(pattern, "target_modules")
        except ConfigError:
            continue
        accepted += 1
        for name in names:
            began = time.process_time()
            re.fullmatch(pattern, f"{name}!")
            assert time.process_time() - began < WITHOUT_END, (pattern, name)
    assert tried / 4 < accepted < tried
