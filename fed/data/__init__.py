"""Digits or text: reading, tokenising, holding out test samples, and partitioning the rest among clients."""
