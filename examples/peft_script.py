"""Fine-tune a causal language model with PEFT's LoRA; two lines, marked below, make its forward and backward fused.

    python examples/peft_script.py                                # a small random Llama learns this file, byte by byte
    python examples/peft_script.py --model CHECKPOINT --text FILE --targets q_proj,v_proj

The losses are those that the script has without the two lines, up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import plora_kernels as pk  # line one


def small_llama() -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights, whose tokens are bytes."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.125}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more))


def rows_of(tokens: list[int], length: int) -> Tensor:
    """Return tokens as rows (…, length), the last incomplete one left out."""
    if len(tokens) < length:
        raise SystemExit(f"the text has {len(tokens)} tokens; --length {length} needs that many at least")
    return torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)


def train(model: Any, rows: Tensor, steps: int, batch_size: int, learning_rate: float) -> list[float]:
    """Train the parameters that require a gradient for some steps, print the losses and return them."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    losses = []
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (batch_size,))].to(model.device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 10 == 0:
            print(f"step {step:>3}  loss {losses[-1]:.4f}")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the script and return the losses."""
    parser = argparse.ArgumentParser(description="Fine-tune a causal language model with PEFT's LoRA, fused.")
    parser.add_argument("--model", help="a local checkpoint; by default a small Llama with random weights")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn (default: this file)")
    parser.add_argument("--targets", default="all-linear", help='names of linears, comma-separated, or "all-linear"')
    parser.add_argument("--out", type=Path, help="where to save the adapter; by default it is not saved")
    for name, value in (("steps", 30), ("batch-size", 4), ("length", 64), ("rank", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    text = options.text.read_text(encoding="utf-8")
    if options.model:
        base = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        tokens = tokenizer(text).input_ids
    else:
        base, tokens = small_llama(), list(text.encode())
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=targets, task_type="CAUSAL_LM")
    base = base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = get_peft_model(base, config)
    print(pk.fuse_peft(model))  # line two
    rows = rows_of(tokens, options.length)
    losses = train(model, rows, options.steps, options.batch_size, options.learning_rate)
    if options.out:
        model.save_pretrained(options.out)  # PEFT's files: the fused layers keep its names and parameters
        print(f"adapter saved: {options.out}")
    return losses


if __name__ == "__main__":
    main()
