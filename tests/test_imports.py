"""The order of imports between folders, and that importing has no side effects."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The folders and files of each package from top to bottom: each imports only from itself and from those after it.
ORDER = {
    "plora_kernels": (
        "nn", "functional", "folding", "ops", "fallback", "kernels", "dispatch", "checks", "backend", "reference",
        "tile_tables", "selection", "tuning", "counter_rng", "errors",
    ),
    "fed": (
        "__main__", "cli", "flower", "commands", "console", "report", "experiments", "simulation", "training", "models",
        "data", "config", "methods", "types", "seeding", "locks", "sealed", "files", "interruption", "openmp", "errors",
    ),
    "bench": (
        "test_layers", "test_simulation", "test_models", "conftest", "compile_ahead", "sitting", "gpu", "timeline",
        "scale", "clients", "flower", "tune", "device", "report", "audit", "models", "measure", "simulation",
        "providers", "checks", "harness", "gpu_cases", "cases",
    ),
}  # fmt: skip
# The other packages that each may import.
MAY_IMPORT = {"plora_kernels": (), "fed": ("plora_kernels",), "bench": ("plora_kernels", "fed")}
PEFT_FILES = ("peft_saving", "peft_layout", "adapter_files", "lora_options")
# Libraries, and the only files and folders that may import them.
RESERVED = {
    "triton": ("plora_kernels/kernels", "bench"),
    "peft": (*(f"plora_kernels/nn/{name}.py" for name in PEFT_FILES), "plora_kernels/nn/fused_peft", "bench"),
    "huggingface_hub": ("plora_kernels/nn/adapter_source.py",),
    "bitsandbytes": ("plora_kernels/nn/quantized/bitsandbytes.py",),
    "torchao": (),
    "trl": (),
    "pydantic": ("fed/config",),
    "typer": ("fed/cli.py",),
    "rich": ("fed/cli.py", "fed/console.py"),
    "matplotlib": ("fed/report", "bench/report/figures.py", "bench/report/scale_figures.py"),
    "scipy": ("fed/report/comparison.py",),
    "tensorboard": ("fed/experiments/trackers.py",),
    "wandb": ("fed/experiments/trackers.py",),
    "mlflow": ("fed/experiments/trackers.py",),
    "sklearn": ("fed/data/digits.py",),
    "transformers": (
        "fed/models", "fed/data/pretrained.py", "fed/data/tokenization.py", "fed/simulation/evaluation.py",
        "plora_kernels/nn/fused_peft", "bench",
    ),
    "tokenizers": ("fed/data/tokenization.py",),
    "datasets": ("fed/data/hf_datasets.py", "fed/data/partition.py"),
    "flwr": ("fed/flower",),
    "flwr_datasets": ("fed/data/partition.py",),
    "dp_accounting": ("fed/simulation/privacy_accounting.py",),
    "pyarrow": ("fed/data/hf_datasets.py",),
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Return the files of the three packages by their dotted names; a package's is that of its `__init__.py`."""
    found = {}
    for package in ORDER:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, planted: str = "") -> set[str]:
    """Return the dotted names a file imports anywhere in it, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(f"{path.read_text(encoding='utf-8')}\n{planted}")):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            # `from fed import data` names a module; `from fed.data import deal` a name in one.
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def graph(planted: Mapping[str, str] | None = None) -> dict[str, set[str]]:
    """Return the modules that each module imports; `planted` code is appended to a module."""
    found = modules()
    edges: dict[str, set[str]] = {}
    for module, path in found.items():
        edges[module] = set()
        for name in imports(path, (planted or {}).get(module, "")):
            while name and name not in found:
                name = name.rpartition(".")[0]
            edges[module] |= {name} - {"", module}
    return edges


def upward(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the imports that do not go down, as sentences."""
    wrong = []
    for module, names in edges.items():
        package, *inside = module.split(".")
        if not inside:
            continue  # the package's `__init__.py`, which is above everything
        order = ORDER[package]
        for name in sorted(names):
            other, *below = name.split(".")
            if other != package:
                fine = other in MAY_IMPORT[package]
            elif not below:
                fine = False  # the package itself, imported from inside
            else:
                fine = below[0] == inside[0] or order.index(below[0]) > order.index(inside[0])
            if not fine:
                wrong.append(f"{module} imports {name}")
    return wrong


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """Return the modules in circles of imports, and those that import only such modules."""
    open_ones = dict(edges)
    while leaves := [module for module, needs in open_ones.items() if not needs & open_ones.keys()]:
        for module in leaves:
            del open_ones[module]
    return sorted(open_ones)


def test_imports_go_down_the_folders_of_every_package() -> None:
    found = modules()
    listed = {f"{package}.{name}" for package, names in ORDER.items() for name in names}
    assert {".".join(module.split(".")[:2]) for module in found} - ORDER.keys() == listed
    assert upward(graph()) == []


def test_no_file_imports_itself_by_a_detour() -> None:
    assert circles(graph()) == []


def test_libraries_are_imported_where_they_belong() -> None:
    for path in modules().values():
        relative = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            places = RESERVED.get(name.split(".")[0])
            allowed = places is None or any(relative == place or relative.startswith(f"{place}/") for place in places)
            assert allowed, f"{relative} imports {name}"


def test_fed_uses_public_names_of_plora_kernels() -> None:
    import plora_kernels

    public = set(plora_kernels.__all__)
    for path in (ROOT / "fed").rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] != "plora_kernels" or len(parts) == 1 or parts[1] in public, f"{path} imports {name}"


# Forbidden imports: the module, the import appended to it, the module that it imports.
PLANTED = (
    ("bench.cases", "from bench.report.figures import draw", "bench.report.figures"),
    ("fed.errors", "from fed.training import local", "fed.training.local"),
    ("fed.methods.fedit", "def f():\n    import fed.simulation.rounds", "fed.simulation.rounds"),
    ("fed.seeding", "from bench import cases", "bench.cases"),
    ("plora_kernels.kernels.fold", "from plora_kernels import fold_", "plora_kernels"),
    ("plora_kernels.tuning.blocks", "from ..ops import linear", "plora_kernels.ops.linear"),
)


def test_an_import_that_goes_up_is_seen() -> None:
    planted = graph({module: code for module, code, _ in PLANTED})
    assert sorted(upward(planted)) == [f"{module} imports {name}" for module, _, name in PLANTED]
    assert "fed.errors" in circles(planted)


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


WITHOUT_TRITON = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Refuse())
import torch, plora_kernels as pk
layer = pk.FusedPLoRALinear(6, 4, rank=3)
layer.select([0])
layer(torch.randn(2, 6)).sum().backward()
assert pk.backend() == "torch" and "triton" not in sys.modules
print("ran")
"""


def test_runs_on_cpu_without_triton() -> None:
    assert run_python(WITHOUT_TRITON, PLORA_BACKEND="").strip() == "ran"


def test_asking_for_triton_without_triton_is_an_error() -> None:
    code = WITHOUT_TRITON.split("import torch")[0] + (
        "import plora_kernels as pk\ntry:\n    pk.backend()\nexcept pk.ConfigError as error:\n    print(error)\n"
    )
    assert "Triton is not installed" in run_python(code, PLORA_BACKEND="triton")


def test_importing_loads_nothing_heavy_and_draws_nothing() -> None:
    code = """
import sys, torch
before, default = torch.get_rng_state(), torch.get_default_dtype()
linear = torch.nn.Linear.forward
import plora_kernels, fed, bench
libraries = {"triton", "peft", "transformers", "pydantic", "typer", "matplotlib", "sklearn", "datasets"}
heavy = {*libraries, "flwr", "flwr_datasets"} & set(sys.modules)
assert not heavy, heavy
assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() is default
assert torch.nn.Linear.forward is linear and not torch.cuda.is_initialized()
print("clean")
"""
    assert run_python(code).strip() == "clean"
