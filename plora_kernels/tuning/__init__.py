"""Block sizes: their definition, safe defaults, tuned tables, and the choice for a launch."""
