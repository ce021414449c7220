"""Train a fused PEFT model with transformers' Trainer, stop, and resume from its checkpoint in a new model.

    python examples/trainer.py --out runs/trainer
    python examples/trainer.py --out runs/trainer --model CHECKPOINT --text FILE

The checkpoints are the Trainer's own and hold the adapter alone, in PEFT's files. Neither says that the model was
fused: a resumed run calls `fuse_peft` again, or goes on with PEFT's forward.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import plora_kernels as pk


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows of `length` tokens; each is its own label."""

    def __init__(self, tokens: list[int], length: int) -> None:
        """Cut the tokens into rows and leave the last incomplete one out."""
        if len(tokens) < length:
            raise SystemExit(f"the text has {len(tokens)} tokens; --length {length} needs that many at least")
        self.rows = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def small_llama() -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights, the same at every call, whose tokens are bytes."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.125}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more))


def fused_model(checkpoint: str | None) -> tuple[Any, pk.FusionReport]:
    """Return a PEFT model over the base, its LoRA layers fused, and their report; A is drawn from a fixed seed."""
    load = AutoModelForCausalLM.from_pretrained
    base = load(checkpoint, trust_remote_code=False) if checkpoint else small_llama()
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    report = pk.fuse_peft(model)
    return model, report


def trainer_of(model: Any, rows: Rows, out: Path, steps: int) -> Trainer:
    """Return a Trainer that saves a checkpoint every ten steps."""
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=10,
        save_steps=10,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    return trainer


def main(arguments: list[str] | None = None) -> dict[str, Tensor]:
    """Run the script and return the adapter's tensors at the end."""
    parser = argparse.ArgumentParser(description="Train a fused PEFT model with the Trainer, stop and resume.")
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), help="where checkpoints go")
    parser.add_argument("--model", help="a local checkpoint; by default a small Llama with random weights")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn (default: this file)")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument(
        "--stop", type=int, default=10, help="the step after which the first run ends, a multiple of 10"
    )
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    text = options.text.read_text(encoding="utf-8")
    tokens = list(text.encode())
    if options.model:
        tokens = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)(text).input_ids
    rows = Rows(tokens, options.length)

    model, report = fused_model(options.model)
    resumed = None
    if options.stop < options.steps:
        trainer_of(model, rows, options.out, options.stop).train()
        resumed = str(options.out / f"checkpoint-{options.stop}")
        print(f"stopped after step {options.stop}; a new model resumes from {resumed}")
        model, report = fused_model(options.model)
    trainer_of(model, rows, options.out, options.steps).train(resume_from_checkpoint=resumed)
    print(report)
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    main()
