"""`python -m fed estimate` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers as tf

from tests.support.command_line import Call


def test_it_prints_compute_memory_bytes_and_time(fed_cli: Call) -> None:
    done = fed_cli(
        *("estimate", "digits", "rounds=2", "--clients", "1000,1000000", "--machines", "1,8"),
        *("--clients-per-second", "5", "--server-seconds", "0.5", "--server-mbit", "100"),
    )
    assert (done.status, done.err) == (0, "")
    for said in ("a client of rank", "496 MFLOP", "31.4 kB", "1,000,000", "machines", "400.0 ms", "500.0 ms"):
        assert said in done.out
    assert "10 clients in a cohort" in done.out


def test_without_a_speed_there_is_no_time(fed_cli: Call) -> None:
    done = fed_cli("estimate", "digits", "rounds=2")
    assert done.status == 0
    assert "machines" not in done.out


def test_a_checkpoint_s_config_is_enough(fed_cli: Call, tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.BertConfig(vocab_size=50, max_position_embeddings=200, **sizes).save_pretrained(tmp_path)
    done = fed_cli("estimate", "glue-paper", f"model.path={tmp_path}", "data.subset=sst2", "rounds=2", "--labels", "5")
    assert (done.status, done.err) == (0, "")
    assert "125 (train)" in done.out  # a head of 5 labels
    assert "evaluation is not counted: --test-rows says how many rows the server tests on" in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--clients", "5"), "--clients is 5: it should be at least clients.per_round (10)"),
        (("--clients", "many"), "--clients is 'many': it should be numbers from 1 to 1000000000, such as 1,8,64"),
        (
            ("--machines", "0", "--clients-per-second", "1"),
            "--machines is '0': it should be numbers from 1 to 1000000000",
        ),
        (("--machines", "8"), "--clients-per-second is missing: the time on machines follows from that of one"),
        (("--server-mbit", "8"), "--clients-per-second is missing: --server-mbit goes with it"),
        (("--clients-per-second", "0"), "--clients-per-second is 0: it should be a number above 0"),
        (("--clients-per-second", "nan"), "--clients-per-second is nan: it should be a number above 0"),
        (("--tokens", "7"), "--tokens is 7: the rows of data.name = 'digits' are images of 16 patches"),
        (("method=nonsense",), "method is 'nonsense'"),
        (("--tokens", "x"), "Invalid value for '--tokens'"),
    ],
)
def test_bad_input_is_one_line(fed_cli: Call, arguments: tuple[str, ...], said: str) -> None:
    done = fed_cli("estimate", "digits", *arguments)
    assert done.status == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_a_model_path_without_a_configuration_is_named(fed_cli: Call, tmp_path: Path) -> None:
    done = fed_cli("estimate", "glue-paper", f"model.path={tmp_path}")
    assert done.status == 2
    assert "no config.json there, so it is not a checkpoint" in done.err
