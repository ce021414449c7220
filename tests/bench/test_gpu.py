"""`python -m bench.gpu` from start to finish on tiny sizes: what it writes, resumes, refuses and shows."""

from collections import Counter
from pathlib import Path

import pytest
import torch

import plora_kernels as pk
from bench import gpu
from bench.cases import FOLDS, OPS, Case
from bench.checks.correctness import WrongResultError, poisoned_outputs
from bench.checks.inputs import DTYPES, CheckShape, draw
from bench.checks.operators import check_shapes, run_checks
from bench.device import run as device_run
from bench.device import simulations
from bench.gpu_cases import GATE, TABLE, TABLE_RANKS, TABLE_ROWS, TINY, device_cases
from bench.harness import machine
from bench.harness.records import KEYS, MODEL, SIMULATION, RecordFile, case_key, load_records
from bench.harness.timing import Plan
from bench.measure import measure_on_device
from bench.models.providers import EAGER
from bench.providers.registry import every_provider
from bench.report.command import main
from bench.report.device_tables import committed_section, device_markdown, summary
from bench.report.markdown import markers
from bench.report.runs import by_case
from bench.simulation.providers import COMPILED
from bench.simulation.providers import PROVIDERS as SIMULATED
from plora_kernels.kernels import replay
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import DESIGNS, Hardware
from tests.test_imports import imports, modules, run_python

CPU = torch.device("cpu")
OWN = ["fused-apart", "fused-inplace", "fused", "fused-mixed"]
QUICK = ["--device", "cpu", "--providers", "base", "peft", "peft-autocast", "inplace", *OWN]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PLAN", Plan(seconds_per_provider=0.0, min_rounds=3))
        assert gpu.main(["--out", str(folder), *QUICK]) == 0
    return folder / "cpu.json"


def test_every_record_has_the_keys_and_every_case_its_providers(results: Path) -> None:
    meta, records = load_records(results)
    assert set(meta) >= {"device_name", "versions", "commit", "source", "ceilings", "date"}
    assert meta["ceilings"]["copy_gbps"] > 0
    timed = [record for record in records if record["status"] == "timed" and record["op"] in OPS]
    assert all(name in record for record in records for name in KEYS)
    assert {record["op"] for record in timed} == set(OPS)
    assert Counter(record["provider"] for record in timed) == {
        **{"base": 11, "peft": 11, "fused": 11},
        **{"inplace": 6, "fused-apart": 3, "fused-inplace": 1, "fused-mixed": 2, "peft-autocast": 3},
    }
    for record in timed:
        assert record["time_ms"] > 0
        assert record["ratio_to_base"] > 0
        assert record["peak_bytes"] >= 0
        copies = record["op"] in FOLDS and record["provider"] == "base"
        assert (record["tflops"] > 0) is not copies
        assert record["gbps"] > 0


def test_the_operators_are_checked_in_every_dtype_and_form(results: Path) -> None:
    checks = [record for record in load_records(results)[1] if record["op"] == "check"]
    assert {record["dtype"] for record in checks} == {name for name in DTYPES if name != "tf32"}
    assert {record["form"] for record in checks} >= {
        *("all", "folded mask", "frozen mask", "none selected", "fold"),
        *("grouped", "grouped mask dropout", "siblings"),
    }
    assert {record["status"] for record in checks} == {"passed"}


def test_training_steps_of_many_clients_are_measured_and_shown(results: Path) -> None:
    meta, records = load_records(results)
    steps = [record for record in records if record["op"] == SIMULATION]
    assert [record["provider"] for record in steps] == [name for name in SIMULATED if name != COMPILED]
    assert all(record["status"] == "timed" and record["seconds"] > 0 for record in steps)
    assert "**Training steps of many clients.** Clients trained one step in a second" in device_markdown(meta, records)
    assert "| digits-vit, 2×17 | 2 |" in device_markdown(meta, records)


def test_whole_models_are_measured_and_shown(results: Path) -> None:
    meta, records = load_records(results)
    steps = [record for record in records if record["op"] == MODEL]
    assert [(record["model"], record["provider"]) for record in steps] == [
        (model, provider) for model in ("tiny-bert", "tiny-gpt2") for provider in EAGER
    ]
    absent = [record for record in steps if record["status"] != "timed"]
    assert [(record["model"], record["provider"]) for record in absent] == [("tiny-gpt2", "inject")]
    assert "Conv1D" in absent[0]["cause"]
    text = device_markdown(meta, records)
    assert "**Whole models.** One training step of one model" in text
    assert text.count("| tiny-gpt2, 2×8, float32 |") == 2
    assert f"- *inject* of tiny-gpt2: not available: {absent[0]['cause']}." in text


def test_a_second_call_measures_nothing_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_records(results)
    for module, name in ((gpu, "ceilings"), (device_run, "perform"), (simulations, "perform")):
        monkeypatch.setattr(module, name, lambda *given: pytest.fail("measured again"))
    assert gpu.main(["--out", str(results.parent), *QUICK]) == 0
    assert load_records(results) == before


def test_without_time_it_says_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path), *QUICK, "--budget-seconds", "0"]) == 0
    shown = capsys.readouterr().out
    assert "left: forward 64×48 M 32 R 4 float32 (base, peft, peft-autocast, inplace, fused); " in shown
    assert "digits-vit-2x17-c2-float32 (base, peft-loop, vmap, sequential, cohort); " in shown
    assert "tiny-gpt2-2x8-float32 (base, peft, fuse-peft, inject); " in shown
    assert "check float32 M 1 K 1 N 1 R 1\n" in shown
    assert "goes on from here" in shown
    assert load_records(tmp_path / "cpu.json")[1] == []


def test_other_code_is_not_mixed_in(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "source_digest", lambda: "changed")
    assert gpu.main(["--out", str(results.parent), *QUICK]) == 2
    assert "--fresh starts over" in capsys.readouterr().err


def test_a_wrong_provider_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pk.FusedPLoRALinear.forward
    monkeypatch.setattr(pk.FusedPLoRALinear, "forward", lambda self, x: forward(self, x) * 1.001)
    case = Case("forward", TINY, 32, 4, "float32")
    wanted = ("peft", "peft-autocast", "inplace", "fused")
    failed = {"inplace": "its process ended"}
    records = {r["provider"]: r for r in measure_on_device(case, CPU, Plan(0.0, 3), wanted, failed)}
    assert records["fused"]["status"] == "wrong"
    assert "y is off by" in str(records["fused"]["cause"])
    assert records["fused"]["time_ms"] is None
    assert records["inplace"]["cause"] == "its process ended"
    assert records["peft-autocast"]["status"] == "not available"
    assert records["peft"]["status"] == records["base"]["status"] == "timed"


@pytest.mark.usefixtures("kernels")
def test_records_name_the_blocks_and_replayed_calls_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    case, wanted, plan = Case("forward", TINY, 8, 4, "float32"), ("fused", "inplace"), Plan(0.0, 2)
    records = {r["provider"]: r for r in measure_on_device(case, CPU, plan, wanted, {})}
    assert records["fused"]["status"] == "timed"
    blocks = records["fused"]["blocks"]
    assert isinstance(blocks, dict)
    assert set(blocks) == {"forward"}
    assert blocks["forward"]["design"] == "tile"
    assert "blocks" not in records["inplace"]
    real = replay._Launch.run

    def off(self: replay._Launch, slots: list, device: torch.device) -> None:
        real(self, slots, device)
        slots[4].mul_(1.001)

    monkeypatch.setattr(replay._Launch, "run", off)
    lookup.forget_tables()
    records = {r["provider"]: r for r in measure_on_device(case, CPU, plan, wanted, {})}
    assert records["fused"]["status"] == "wrong"


def test_a_wrong_operator_is_found_by_the_checks_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pk, "fold_", lambda weight, *given, **named: weight)
    records = run_checks(CheckShape("cpu", "float32", 37, 50, 29, 5))
    assert [record["form"] for record in records if record["status"] == "wrong"] == ["fold", "folds agree"]
    assert gpu.main(["--out", str(tmp_path), *QUICK, "--ops", "fold"]) == 1
    shown = capsys.readouterr().out
    assert "WRONG fold: fold: weight is off by" in shown
    assert shown.splitlines()[-1].startswith("WRONG check m 37 k 50 n 29 r 5 dtype float32, folds agree")


@pytest.mark.slow
def test_a_wrong_whole_model_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = pk.FusedPLoRALinear.forward
    monkeypatch.setattr(pk.FusedPLoRALinear, "forward", lambda self, x: forward(self, x) * 1.001)
    assert gpu.main(["--out", str(tmp_path), *QUICK, "--ops", MODEL, "--no-checks"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("WRONG model model tiny-bert batch 2 length 8 dtype float32, inject: inject: ")
    statuses = {(one["model"], one["provider"]): one["status"] for one in load_records(tmp_path / "cpu.json")[1]}
    assert [key for key, status in statuses.items() if status == "wrong"] == [("tiny-bert", "inject")]
    assert statuses["tiny-bert", "fuse-peft"] == "timed"


@pytest.mark.slow
def test_a_gpu_machine_needs_none_of_the_simulator_s_libraries() -> None:
    absent = {"pydantic", "datasets", "flwr", "hypothesis", "ruff", "typer", "rich", "tomli_w", "sklearn", "scipy"}
    for path in (path for name, path in modules().items() if not name.startswith("fed")):
        assert not {name.split(".")[0] for name in imports(path)} & absent, path.name
    # It imports the part of `fed` that trains clients, which does not import them either.
    code = f"""
import sys
sys.modules |= dict.fromkeys({sorted(absent)})
import bench.gpu, bench.tune.command, bench.report.command, bench.sitting
print("imported")
"""
    assert run_python(code).strip() == "imported"


def test_every_design_is_checked_where_it_runs() -> None:
    aligned, odd = CheckShape("cpu", "bfloat16", 128, 512, 384, 16), CheckShape("cpu", "tf32", 128, 512, 384, 16)
    both = {"forward", "input_gradient"}
    for design in DESIGNS:
        found, of_odd = (set(shape.blocks(design, Hardware(90, 132))) for shape in (aligned, odd))
        assert found == of_odd == both
    assert aligned.blocks("persistent", Hardware(80, 108)) == {}


def test_an_element_that_is_not_written_is_found() -> None:
    with poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(3)).isnan().all()
        assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert not torch.empty(1000).isnan().all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", ["float16", "mixed-float16"])
def test_the_kernels_pass_their_checks(dtype: str) -> None:
    records = run_checks(CheckShape("cpu", dtype, 37, 50, 29, 5))
    assert {record["status"] for record in records} == {"passed"}


@pytest.mark.usefixtures("kernels")
def test_gradients_that_were_rounded_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels import linear

    real = linear.backward

    def rounding(*arguments: object) -> tuple[torch.Tensor, ...]:
        d_x, *gradients = real(*arguments)
        return d_x, *(gradient.half().to(gradient.dtype) for gradient in gradients)

    shape = CheckShape("cpu", "mixed-float16", 37, 50, 29, 5)
    for changed in (rounding, lambda *arguments: tuple(one.half() for one in real(*arguments))):
        monkeypatch.setattr(linear, "backward", changed)
        (record,) = run_checks(shape, ["all"])
        assert record["status"] == "wrong"
        assert "float32" in record["cause"]


def test_the_important_cases_come_first_and_each_once() -> None:
    cases = device_cases("cuda")
    assert len(set(cases)) == len(cases)
    assert [(case.op, case.projection, case.r) for case in cases[:2]] == [
        ("forward", GATE, 16),
        ("forward_backward", GATE, 16),
    ]
    found = {(c.op, c.projection, c.r) for c in cases if c.m == TABLE_ROWS and c.dtype == "bfloat16"}
    assert found >= {(op, p, r) for op in ("forward", "forward_backward") for p in TABLE for r in TABLE_RANKS}
    assert {c.m for c in cases} >= {0, 1, 16, 8192}
    assert {c.r for c in cases} >= {8, 16, 32, 64, 128, 256}
    assert {c.dtype for c in cases} == {"bfloat16", "float16", "float32"}
    halves = {"bfloat16", "float16", "mixed-bfloat16", "mixed-float16"}
    assert {shape.dtype for shape in check_shapes("cuda")} == {*halves, "float32", "tf32"}


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_every_provider_but_the_compiled_is_right_in_half_precision(op: str) -> None:
    case = Case(op, TINY, 32, 4, "bfloat16")  # type: ignore[arg-type]
    wanted = [name for name in every_provider(case.op) if name != "peft-compiled"]
    records = measure_on_device(case, CPU, Plan(0.0, 3), wanted, {})
    assert [(record["provider"], record["status"]) for record in records] == [(name, "timed") for name in wanted]


def test_the_readme_section_is_made_from_the_file(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = markers("gpu")
    readme.write_text(f"# Title\n\n{begin}\nstale figures\n{end}\n", encoding="utf-8")
    assert main([str(results), "--readme", str(readme)]) == 0
    text = readme.read_text(encoding="utf-8")
    assert device_markdown(*load_records(results)).strip() in text
    assert committed_section(results.parent) in text
    assert "stale figures" not in text
    row = next(line for line in text.splitlines() if line.startswith("| 64×48, R 4 |"))
    fused = next(p["fused"] for p in by_case(load_records(results)[1]))
    assert f"({fused['ratio_to_base']:.2f})" in row
    assert "nothing was wrong" in text


def test_every_op_has_a_section_and_several_projections_their_widths(results: Path) -> None:
    meta, records = load_records(results)
    text = device_markdown(meta, records)
    for title in ("LoRA dropout", "Projections of one input, forward", "Fold out of place", "Fold of many weights"):
        assert text.count(f"**{title}**") == 1
    lines = [line for line in text.splitlines() if line.startswith("| 64×(48+16+16), R 4 |")]
    assert len(lines) == 3
    assert text.count("| fused ÷ peft | fused ÷ apart | host peft / fused |") == 3
    out = next(providers for providers in by_case(records) if "fused-inplace" in providers)
    in_place = out["fused"]["time_ms"] / out["fused-inplace"]["time_ms"]
    section = text.split("**Fold out of place**")[1].split("**Fold of many")[0]
    assert f"| {out['fused']['ratio_to_peft']:.2f} | {in_place:.2f} | – / – |" in section
    assert text.count("| mixed ÷ peft | mixed ÷ autocast | mixed ÷ fused | host peft / mixed |") == 2
    apart = next(p["fused-apart"] for p in by_case(records) if "fused-apart" in p)
    assert apart["widths"] == [48, 16, 16]
    assert f"({apart['ratio_to_base']:.2f})" in "".join(lines)
    header, *rows = summary(meta, records).splitlines()
    assert header.split()[3:] == ["fused", "mixed", "apart", "place", "inpl", "comp", "peft", "auto", "host", "µs"]
    several = next(row for row in rows if row.startswith("projections_forward 32 64 80 4 float32"))
    assert f"{apart['ratio_to_base']:.3f}" in several


def test_a_readme_without_a_device_says_so(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text("{}", encoding="utf-8")
    assert committed_section(tmp_path).startswith("GPU: not yet measured.")


def test_the_terminal_shows_what_was_wrong(results: Path) -> None:
    meta, records = load_records(results)
    wrong = {"time_ms": None, "ratio_to_base": None, "status": "wrong"}
    broken = [{**record, **wrong} if record["provider"] == "fused" else record for record in records]
    assert "WRONG" in summary(meta, broken)
    assert "WRONG" not in summary(meta, records)
    assert "results were wrong and not timed" in device_markdown(meta, broken)


def test_what_is_of_another_commit_or_of_default_blocks_is_said_to_be(results: Path, tmp_path: Path) -> None:
    meta, records = load_records(results)
    folder = tmp_path / "results"
    moved = [{**one, "commit": "fedcba9876543210"} if one["provider"] == "peft" else one for one in records]
    RecordFile(folder / "thing.json", dict(meta), moved).save()
    forward = [one for one in records if one["op"] == "forward" and one["provider"] in ("base", "fused")]
    slower = [{**one, "time_ms": 7.0, "ratio_to_base": 77.0} for one in forward]
    RecordFile(folder / "defaults" / "thing.json", dict(meta) | {"commit": "00112233"}, slower).save()
    text = committed_section(folder)
    assert text.count("7 (77.00)") == len({case_key(one) for one in forward})  # of *fused* alone, not of *base*
    assert "| untuned |" in text.split("**Forward**")[1].split("**")[0]
    assert "*untuned* is *fused* with default blocks" in text
    assert "commit 00112233: *untuned*" in text
    assert "commit fedcba987654: forward, " in text
    assert "Measured before the rest" not in device_markdown(meta, records)


def test_a_missing_device_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "error: there is no CUDA device; --device cpu tries the command out\n"


def test_a_difference_between_two_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.checks import operators

    drift = iter(range(1, 100))
    fused = operators._fused
    monkeypatch.setattr(operators, "_fused", lambda *given: {"y": fused(*given)["y"] + next(drift)}, raising=True)
    shape = CheckShape("cpu", "float32", 4, 4, 4, 2)
    with pytest.raises(WrongResultError, match="y of two runs differ by"):
        operators._check_deterministic(shape, draw(shape), "deterministic")
