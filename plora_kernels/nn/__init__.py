"""Layers of a model: `FusedPLoRALinear`, injection, PEFT files."""
