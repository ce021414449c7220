"""Hold the cost model to runs: `python -m bench.scale --out docs/results`."""

from bench.harness.processes import end_on_termination, leave
from bench.scale.command import main

if __name__ == "__main__":
    end_on_termination()
    leave(main())
