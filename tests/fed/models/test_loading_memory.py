"""Host memory that loading a checkpoint takes, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

MIB = 2**20
# Loads a checkpoint, reads every weight, and prints by how many bytes the process's peak and its own pages grew.
CHILD = """
import json, re, sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, AutoConfig

from fed.models.checkpoint import Form, load_weights


def status(key):
    return 1024 * int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


small, large, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
form = Form(dtype, "none", "auto", torch.device("cpu"))
load_weights(LlamaForCausalLM, small, AutoConfig.from_pretrained(small), form, "")  # what the libraries take once
before = status("VmRSS"), status("RssAnon")
model = load_weights(LlamaForCausalLM, large, AutoConfig.from_pretrained(large), form, "").model
assert sum(value.float().sum().item() for value in model.parameters()) != 0
print(json.dumps([status("VmHWM") - before[0], status("RssAnon") - before[1]]))
"""


def checkpoint(folder: Path, width: int) -> int:
    """Save a Llama of some width in float32 and return the size of its weights in bytes."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 12, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=8, num_key_value_heads=8, **sizes))
    model.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's pages")
@pytest.mark.parametrize(
    ("asked", "most_peak", "most_own"),
    [
        ("auto", 1.25, 0.25),  # mapped from the file, of which the system may drop pages again
        ("bfloat16", 1.85, 0.75),  # the file's pages, and the converted weights at half their size
    ],
)
def test_loading_never_holds_a_second_copy(asked: str, most_peak: float, most_own: float, tmp_path: Path) -> None:
    checkpoint(tmp_path / "small", 16)
    size = checkpoint(tmp_path / "large", 512)
    assert size > 100 * MIB
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large"), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    peak, private = json.loads(done.stdout.splitlines()[-1])
    assert peak <= most_peak * size
    assert private <= most_own * size
