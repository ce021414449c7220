"""Find the fastest block sizes for the present device: `python -m bench.tune`."""

from bench.harness.processes import end_on_termination, leave
from bench.tune.command import main

if __name__ == "__main__":
    end_on_termination()
    leave(main())
