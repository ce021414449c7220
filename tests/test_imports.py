"""The direction of imports, and what importing does not do."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# plora_kernels: each file imports only what stands left of it.
ORDER = (
    ("errors", "blocks", "hashing"),
    ("selection", "tables", "dropout", "candidates"),
    ("configs",),
    ("reference", "rounding"),
    ("backend", "checks", "torch_path", "torch_grouped", "operators", "tile_tables"),
    ("kernels", "torch_fold", "group_checks", "group_products"),
    ("ops", "group_memory"),
    ("folding", "projections", "grouped"),
    ("functional",),
    ("row_groups",),
    ("linear",),
    ("shared_input",),
    ("inject",),
    ("peft",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# What only these files may import.
RESERVED = {
    "triton": {"plora_kernels/kernels", "bench"},
    "peft": {"plora_kernels/peft.py", "bench"},
    "pydantic": {"fed/config.py", "fed/data_config.py", "fed/schema.py", "fed/training_config.py"},
    "typer": {"fed/cli.py"},
    "rich": {"fed/cli.py", "fed/console.py", "fed/board.py"},
    "matplotlib": {"fed/canvas.py", "fed/pictures.py", "fed/curves.py", "fed/heatmaps.py", "bench"},
    "scipy": {"fed/paired.py"},
    "tensorboard": {"fed/trackers.py"},
    "wandb": {"fed/trackers.py"},
    "mlflow": {"fed/trackers.py"},
    "sklearn": {"fed/digits.py"},
    "transformers": {"fed/models.py", "fed/tokens.py", "fed/generate.py", "fed/small_model.py", "bench"},
    "tokenizers": {"fed/tokens.py", "fed/small_model.py"},
    "datasets": {"fed/hub.py", "fed/flower_partition.py"},
    "flwr_datasets": {"fed/flower_partition.py"},
    "flwr": {"fed/flower.py"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Return the dotted names a file imports anywhere in it, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            # `from . import x` and `from .kernels import x` name modules; `from .ops import f` a function of one.
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", sources("plora_kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_plora_kernels_imports_leftwards(path: Path) -> None:
    relative = path.relative_to(ROOT / "plora_kernels").parts
    if relative == ("__init__.py",):
        return
    own = relative[0].removesuffix(".py")
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("fed", "bench", "tests"), f"{path.name} imports {name}"
        if parts[0] == "plora_kernels":
            assert parts[1] == own == "kernels" or LEVEL[parts[1]] < LEVEL[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", [*sources("plora_kernels"), *sources("fed"), *sources("bench")], ids=str)
def test_libraries_are_imported_where_they_belong(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    for name in imports(path):
        library = name.split(".")[0]
        if library in RESERVED:
            places = RESERVED[library]
            assert any(relative == place or relative.startswith(f"{place}/") for place in places), f"imports {name}"


@pytest.mark.parametrize("path", sources("fed"), ids=lambda p: str(p.relative_to(ROOT)))
def test_fed_uses_public_names_of_plora_kernels(path: Path) -> None:
    import plora_kernels

    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in ("bench", "tests"), f"imports {name}"
        if parts[0] == "plora_kernels" and len(parts) > 1:
            assert parts[1] in plora_kernels.__all__, f"imports {name}"


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
heavy = {*libraries, "flwr_datasets"} & set(sys.modules)
assert not heavy, heavy
assert torch.equal(before, torch.get_rng_state()) and torch.get_default_dtype() is default
assert torch.nn.Linear.forward is linear and not torch.cuda.is_initialized()
print("clean")
"""
    assert run_python(code).strip() == "clean"
