"""A federated run of a small language model on instructions, and its result in plain transformers and PEFT.

    python examples/slm_federated.py --out runs/slm
    python examples/slm_federated.py --out runs/slm --model CHECKPOINT --data FOLDER    # JSONL, a file a task

Without `--model` a Llama of 30,000 numbers is first trained on three tasks; clients of ranks 1 to 4 then adapt it to
two others, all in one pass over one model. It shows the steps; so small a model learns little. At the end base and
adapter are loaded as by any user of PEFT, and fused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from small_llama import Recipe, make
from transformers import AutoModelForCausalLM, AutoTokenizer

import plora_kernels as pk
from fed import commands, config

WORDS = ("rain", "snow", "wind", "hail", "mist", "dew", "ice", "sun", "fog", "sky", "sea", "hill")
TASKS = {  # an instruction, and the answer to a word
    "copy": ("Say it again.", lambda word: word),
    "first": ("Name the first letter.", lambda word: word[0]),
    "upper": ("Use capitals.", lambda word: word.upper()),
    "last": ("Name the last letter.", lambda word: word[-1]),
    "double": ("Say it twice.", lambda word: f"{word} {word}"),
}
LEARNED = ("copy", "first", "upper")  # before the run; the clients get the others
PROMPT = "{instruction}\nInput: {input}\nOutput:\n"


def rows_of(task: str) -> list[dict[str, str]]:
    """Return the rows of a task."""
    instruction, answer = TASKS[task]
    return [{"instruction": instruction, "input": word, "output": answer(word)} for word in WORDS]


def write_data(folder: Path) -> Path:
    """Write the clients' tasks, a JSONL file each, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS.keys() - set(LEARNED):
        lines = [json.dumps(row) + "\n" for row in rows_of(task)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def write_model(folder: Path, steps: int) -> Path:
    """Train a small Llama and its tokenizer on the learned tasks, save a checkpoint, and return its folder."""
    texts = [PROMPT.format(**row) + row["output"] for task in LEARNED for row in rows_of(task)]
    make(texts * 8, Recipe(layers=2, width=32, vocabulary=300, length=64, steps=steps, learning_rate=1e-2), folder)
    return folder


def settings_of(model: Path, data: Path, rounds: int) -> config.RunConfig:
    """Return the configuration: six clients, four of them a round, each with rows of its own and a rank of its own."""
    tables: dict[str, Any] = {
        "rounds": rounds,
        "execution": "cohort",  # a round's clients train together, over one copy of the model
        "clients_per_pass": 4,
        "model": {"path": str(model)},
        "data": {
            "path": str(data),
            "task": "instruction",
            "prompt": PROMPT,
            "partition": "iid",
            "max_length": 64,
            "max_new_tokens": 8,
            "cache": False,
        },
        "clients": {"count": 6, "per_round": 4, "ranks": [1, 2, 4]},
        "adapter": {"rank": 4, "alpha": 8.0, "unselected": "frozen"},
        "train": {"learning_rate": 2e-2, "batch_size": 4, "local_steps": 4},
        "measure": {"generate": "last", "similarity": False},
    }
    return config.parse(tables, where="this example")


def answer(run: Path, base: Path, prompt: str) -> str:
    """Return the answer of a run's model, loaded with plain transformers and PEFT and then fused."""
    tokenizer = AutoTokenizer.from_pretrained(run / "base", trust_remote_code=False)
    plain = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    model = PeftModel.from_pretrained(plain, str(run / "adapter"))
    print(repr(pk.fuse_peft(model)))
    tokens = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        new = model.generate(input_ids=tokens.input_ids, max_new_tokens=8, do_sample=False)[
            0, tokens.input_ids.shape[1] :
        ]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def main(arguments: list[str] | None = None) -> Path:
    """Run the example and return the run's folder."""
    parser = argparse.ArgumentParser(description="A federated run of a small language model on instructions.")
    parser.add_argument("--out", type=Path, default=Path("runs/slm"), help="where model, data and run go")
    parser.add_argument("--model", type=Path, help="a local checkpoint; by default a small Llama is trained")
    parser.add_argument("--data", type=Path, help="a folder of JSONL files with instruction, input and output")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--model-steps", type=int, default=150, help="training steps of the small Llama")
    options = parser.parse_args(arguments)

    data = options.data or write_data(options.out / "data")
    model = options.model or write_model(options.out / "model", options.model_steps)
    run = options.out / "run"
    commands.run(settings_of(model, data, options.rounds), run, overwrite=True, centralised=False)
    row = rows_of("last")[0]
    print(f"asked for the last letter of {row['input']!r}: {answer(run, model, PROMPT.format(**row))!r}")
    return run


if __name__ == "__main__":
    main()
