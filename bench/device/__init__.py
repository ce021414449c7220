"""The steps of `python -m bench.gpu`: checks, timings and training steps, in worker processes."""
