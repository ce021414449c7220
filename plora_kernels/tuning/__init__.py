"""Block sizes: what they are, safe defaults, tuned tables, and which one a launch takes."""
