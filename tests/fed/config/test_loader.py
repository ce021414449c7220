"""The configuration: defaults, overrides and errors."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fed import config as configuration
from fed.config import CompareConfig, RunConfig, load, parse, write
from fed.config.loader import PRESETS
from fed.errors import FedError


def keys(table: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in table.items():
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def test_defaults_are_the_digits_preset() -> None:
    assert load("digits") == RunConfig(threads=1)


def test_the_preset_shows_every_key_that_has_a_default() -> None:
    table = tomllib.loads((PRESETS / "digits.toml").read_text())
    assert set(table.pop("compare")) == set(CompareConfig.model_fields)
    shown = keys(table)
    assert shown == keys(RunConfig().model_dump(exclude_none=True))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rounds=7", ("rounds",), 7),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("adapter.alpha=16", ("adapter", "alpha"), 16.0),
        ("clients.ranks=[4, 8]", ("clients", "ranks"), [4, 8]),
        ("adapter.rank_stabilized=true", ("adapter", "rank_stabilized"), True),
        ("adapter.target_modules=['q_proj']", ("adapter", "target_modules"), ["q_proj"]),
        ("adapter.target_modules=.*proj", ("adapter", "target_modules"), ".*proj"),
        ("train.head=freeze", ("train", "head"), "freeze"),
        ("clients.dirichlet_alpha=iid", ("clients", "dirichlet_alpha"), "iid"),
        ("clients.dirichlet_alpha=inf", ("clients", "dirichlet_alpha"), "iid"),
        ("data.text=input", ("data", "text"), "input"),
        ("data.text='a b'", ("data", "text"), "a b"),
        ("data.label=2024", ("data", "label"), "2024"),
        ("data.label=true", ("data", "label"), "true"),
        ("data.label=x=y", ("data", "label"), "x=y"),
    ],
)
def test_overrides_are_toml_or_text(override: str, key: tuple[str, ...], value: object) -> None:
    found: object = load("digits", [override])
    for name in key:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win_over_earlier_ones_and_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("rounds = 3\nseed = 4\n")
    assert (load(path, ["rounds=5", "rounds=6"]).rounds, load(path).seed) == (6, 4)


NAMES = st.text(st.characters(exclude_characters="\0"), min_size=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-8, 1e3),
    ranks=st.lists(st.integers(1, 16), min_size=1, max_size=5),
    alpha=st.floats(0.01, 100) | st.just("iid"),
    targets=st.just("all-linear") | st.lists(NAMES, min_size=1, max_size=3),
)
def test_what_is_written_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, seed: int, rate: float, ranks: list, alpha: object, targets: object
) -> None:
    directory = tmp_path_factory.mktemp("config")
    config = RunConfig.model_validate(
        {
            "seed": seed,
            "train": {"learning_rate": rate},
            "clients": {"ranks": ranks, "dirichlet_alpha": alpha},
            "adapter": {"target_modules": targets},
        }
    )
    write(config, directory / "config.toml")
    assert load(directory / "config.toml") == config
    assert [path.name for path in directory.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("round", "rounds"),
        ("client.ranks", "clients.ranks"),
        ("train.optimiser", "train.optimizer"),
        ("data.labels", "data.label"),
        ("train.learning_rate.x", "train.learning_rate"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(key: str, nearest: str, tmp_path: Path) -> None:
    with pytest.raises(FedError, match=rf"unknown key '{key}'; the nearest is '{nearest}'"):
        load("digits", [f"{key}=1"])
    path = tmp_path / "my.toml"
    path.write_text(f"{key} = 1\n")
    with pytest.raises(FedError, match=rf"my.toml: unknown key '.*'; the nearest is '{nearest}'"):
        load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds is 0: it should be greater than or equal to 1"),
        ("seed=-1", "seed is -1"),
        ("seed=1.5", "seed is 1.5: it should be a valid integer"),
        ("method=fedavg", "method is 'fedavg'; one of fed-plora, fedit, flora"),
        ("train=3", "train is 3: a table belongs there"),
        ("train.learning_rate=-1", "train.learning_rate is -1: it should be greater than 0"),
        ("train.learning_rate=nan", "train.learning_rate is nan"),
        ("train.learning_rate=fast", "train.learning_rate is 'fast': it should be a valid number"),
        ("train.momentum=1", "train.momentum is 1: it should be less than 1"),
        ("train.batch_size=true", "train.batch_size is True: it should be a valid integer"),
        ("adapter.rank=257", "adapter.rank is 257: it should be less than or equal to 256"),
        ("adapter.target_modules=3", "adapter.target_modules is 3: it should be a valid list or a valid string"),
        ("clients.ranks=[]", r"clients.ranks is \[\]: it should have at least 1 item"),
        ("clients.ranks=[2,0]", r"clients.ranks\[1\] is 0: it should be greater than or equal to 1"),
        ("clients.ranks=[2,17]", r"clients.ranks is \[2, 17\]: every rank should be at most adapter.rank \(16\)"),
        ("clients.count=1000001", r"clients.count is 1000001: it should be less than or equal to 1000000"),
        ("clients.per_round=21", r"clients.per_round is 21: it should be at most clients.count \(20\)"),
        ("clients.dirichlet_alpha=some", "clients.dirichlet_alpha is 'some': it should be a valid number or 'iid'"),
        ("method=fedit", r"clients.ranks is \[2, 4, 8, 16\]: FedIT needs every rank equal to adapter.rank \(16\)"),
        ("data.test_fraction=0.7", "data.test_fraction .* is 1.1: it should be below 1"),
        ("data.path=x.jsonl", "data.path is 'x.jsonl': .* data.name should be 'files'"),
        ("model.path=x", "model.path is 'x': digits train an embedded ViT"),
        ("data.name=files", "model.path is missing: text needs a local transformers checkpoint"),
        ("rounds", "--set takes key=value.*got 'rounds'"),
        ("=3", "--set takes key=value"),
    ],
)
def test_a_wrong_value_is_one_line_naming_key_and_value(override: str, message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        load("digits", [override])
    assert "\n" not in str(caught.value)


def test_a_way_to_select_modules_is_refused_where_nothing_selects() -> None:
    assert load("digits", ["adapter.selection=first"]).adapter.selection == "first"
    message = r"adapter.selection is 'first': FLoRA does not select modules, so it takes 'random', the default"
    with pytest.raises(FedError, match=message):
        load("digits", ["method=flora", "adapter.selection=first"])


def test_fedit_takes_ranks_that_are_all_the_adapters() -> None:
    assert load("digits", ["method=fedit", "clients.ranks=[16]"]).method == "fedit"
    # Clients take the ranks in turn: two clients take only the first two.
    overrides = ["method=fedit", "clients.ranks=[16,16,2]", "clients.count=2", "clients.per_round=2"]
    assert load("digits", overrides).clients.count == 2
    with pytest.raises(FedError, match="FedIT needs every rank equal"):
        load("digits", ["method=fedit", "clients.ranks=[8]"])


def test_a_million_clients_may_share_rows() -> None:
    found = load("digits", ["clients.count=1000000", "clients.per_round=0.01", "clients.ranks={4 = 0.3, 8 = 0.7}"])
    assert (found.clients.count, found.clients.per_round, len(found.clients.ranks)) == (1_000_000, 10_000, 10)


def test_a_path_means_files_without_a_shift() -> None:
    data = parse({"model": {"path": "m"}, "data": {"path": "d.jsonl"}}, where="here").data
    assert (data.name, data.shift) == ("files", "none")
    with pytest.raises(FedError, match=r"model.path is missing"):
        parse({"data": {"path": "d.jsonl"}}, where="here")
    with pytest.raises(FedError, match=r"data.shift is 'invert': text takes 'none'"):
        parse({"model": {"path": "m"}, "data": {"path": "d.jsonl", "shift": "invert"}}, where="here")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match="no preset or file is called 'digts'; presets: digits"):
        load("digts")
    (tmp_path / "broken.toml").write_text("rounds = = 3")
    with pytest.raises(FedError, match=r"broken.toml is not TOML: .*line 1"):
        load(tmp_path / "broken.toml")
    with pytest.raises(FedError, match="cannot read"):
        load(tmp_path)
    (tmp_path / "odd.toml").write_text("train = 3\n")
    with pytest.raises(FedError, match="train is 3 in the file, where a table belongs"):
        load(tmp_path / "odd.toml", ["train.momentum=0"])


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        configuration.RunConfig().train.learning_rate = 1.0


def test_only_cohorts_are_compiled() -> None:
    assert load("digits", ["execution=cohort", "cohort_compile=true"]).cohort_compile
    with pytest.raises(
        FedError, match="cohort_compile is true, but execution is 'sequential'; 'cohort' would be right"
    ):
        load("digits", ["cohort_compile=true"])


def test_a_key_of_an_earlier_version_is_refused_by_the_name_it_has_now(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text("cohort_size = 4\n")
    for source, settings, where in (("digits", ["cohort_size=4"], "--set"), (path, [], str(path))):
        with pytest.raises(FedError) as refused:
            load(source, settings)
        assert str(refused.value) == f"{where}: cohort_size is called clients_per_pass"


def test_the_configuration_of_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    write(load("digits", ["execution=cohort", "clients_per_pass=4"]), path)
    path.write_text(path.read_text().replace("clients_per_pass", "cohort_size"))
    assert configuration.load_saved(path).clients_per_pass == 4


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path, end: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes("\ufeff# größer\nrounds = 3\n[train]\nlocal_steps = 2\n".replace("\n", end).encode())
    assert (load(path).rounds, load(path).train.local_steps) == (3, 2)
    assert load(path, ["rounds=4"]).rounds == 4


def test_a_file_in_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    for content, reason in (
        ("rounds = 3\n".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ("seed = 1\n# größer\n".encode("latin-1"), "byte 0xf6 in line 2 is not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(FedError) as refused:
            load(path)
        assert str(refused.value) == f"cannot read {path} as a TOML file: {reason}"


def test_a_setting_whose_bytes_are_no_text_is_refused() -> None:
    with pytest.raises(FedError, match=r"--set data.text: its value should be UTF-8 text; it holds other bytes"):
        load("digits", ["data.text=caf\udce9"])
