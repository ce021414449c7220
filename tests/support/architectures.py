"""Tiny models of many architectures with random weights, each with the inputs it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as tf
from torch import nn

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DISTIL = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SPEECH = {"vocab_size": 64, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **LAYERS}
TOKENS = torch.tensor([[5, 9, 20, 33, 7, 61, 12], [8, 6, 58, 41, 30, 11, 62]])
SOUND = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


@dataclass(frozen=True)
class Architecture:
    """A class of models: how one is built, what it is called with, and PEFT's task type for it."""

    build: Callable[[], nn.Module]
    task_type: str | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: {"input_ids": TOKENS})

    def model(self, seed: int = 0) -> nn.Module:
        """Return a model with the random weights of a seed, in evaluation mode and float64: sums differ by 1e-14."""
        torch.manual_seed(seed)
        return self.build().double().eval()

    def output(self, model: nn.Module) -> torch.Tensor:
        """Return the logits of the model's inputs."""
        with torch.no_grad():
            found = model(**self.inputs)
        return found.logits if "logits" in found else found.start_logits


BOTH = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)}
HEARD = {
    "input_features": torch.linspace(-1, 1, 2 * 8 * 20, dtype=torch.float64).view(2, 8, 20),
    "decoder_input_ids": TOKENS,
}

CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVE = {"input_values": torch.linspace(-1, 1, 2 * 400, dtype=torch.float64).view(2, 400)}

ARCHITECTURES = {
    "bert": Architecture(lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)), "SEQ_CLS"),
    "bert-mlm": Architecture(lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES))),
    "roberta": Architecture(
        lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(pad_token_id=0, **SIZES)), "SEQ_CLS"
    ),
    "electra": Architecture(
        lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(embedding_size=32, **SIZES)), "SEQ_CLS"
    ),
    "distilbert-mlm": Architecture(lambda: tf.DistilBertForMaskedLM(tf.DistilBertConfig(**DISTIL))),
    "deberta": Architecture(lambda: tf.DebertaV2ForSequenceClassification(tf.DebertaV2Config(**SIZES)), "SEQ_CLS"),
    "llama": Architecture(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), "CAUSAL_LM"),
    "llama-tied": Architecture(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **SIZES)), "CAUSAL_LM"
    ),
    "mistral": Architecture(
        lambda: tf.MistralForSequenceClassification(tf.MistralConfig(num_key_value_heads=2, pad_token_id=0, **SIZES)),
        "SEQ_CLS",
    ),
    "opt": Architecture(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                max_position_embeddings=40,
            )
        ),
        "CAUSAL_LM",
    ),
    "phi": Architecture(lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZES)), "CAUSAL_LM"),  # lm_head has a bias
    "t5": Architecture(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)), "SEQ_2_SEQ_LM", BOTH),
    "bart": Architecture(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(max_position_embeddings=40, **SPEECH)),
        "SEQ_2_SEQ_LM",
        BOTH,
    ),
    "vit": Architecture(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
            )
        ),
        None,
        IMAGES,
    ),
    "whisper": Architecture(
        lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SPEECH, **SOUND, **SPECIAL)), None, HEARD
    ),
    "wav2vec2": Architecture(  # its convolution of positions has a parametrization, so copy.copy refuses it
        lambda: tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SIZES, **CONVOLUTIONS, **POSITIONS)),
        "SEQ_CLS",
        WAVE,
    ),
}


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """Add random values to every trainable parameter of the model, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter) * 0.3
                )
    return model
