"""Fine-tune a causal language model on prompts and answers with TRL's SFTTrainer and fused LoRA layers.

    python examples/trl_sft.py                                     # a small random Llama learns to repeat words
    python examples/trl_sft.py --model CHECKPOINT --data FILE      # JSONL with the columns prompt and completion

The SFTTrainer makes the PEFT model itself, from `peft_config`; `fuse_peft` comes after it and changes no object that
the trainer or its optimiser holds.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import plora_kernels as pk


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes, an end of text and a padding."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="<pad>")


def small_llama(tokenizer: Any) -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.125}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more, **special))


def echoes() -> Dataset:
    """Return rows whose answer repeats a word of the prompt."""
    words = ("rain", "snow", "wind", "fog", "sun", "hail", "dew", "ice")
    return Dataset.from_list([{"prompt": f"Say {word}: ", "completion": word} for word in words * 4])


def main(arguments: list[str] | None = None) -> list[float]:
    """Run the script and return the losses that the trainer logged."""
    parser = argparse.ArgumentParser(description="Fine-tune with TRL's SFTTrainer and fused LoRA layers.")
    parser.add_argument("--model", help="a local checkpoint; by default a small Llama with random weights")
    parser.add_argument("--data", help="JSONL with the columns prompt and completion; by default words to repeat")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", help="where the adapter is saved; by default it is not kept")
    options = parser.parse_args(arguments)

    disable_progress_bars()
    torch.manual_seed(0)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        base = AutoModelForCausalLM.from_pretrained(options.model, trust_remote_code=False)
    else:
        tokenizer = byte_tokenizer()
        base = small_llama(tokenizer)
    rows = load_dataset("json", data_files=options.data, split="train") if options.data else echoes()
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            output_dir=options.out or scratch,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=5,
            max_length=128,
            bf16=torch.cuda.is_available(),  # TRL's default, which a CPU would take too
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model=base, args=settings, train_dataset=rows, processing_class=tokenizer, peft_config=config
        )
        report = pk.fuse_peft(trainer.model)
        trainer.train()
        if options.out:
            trainer.save_model()
    print(report)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
