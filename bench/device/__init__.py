"""What `python -m bench.gpu` does in turn: checks, timings, training steps, in worker processes."""
