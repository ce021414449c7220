"""Compile every kernel for GPUs that need not be present: `python -m bench.audit`."""

from bench.audit.command import main

if __name__ == "__main__":
    raise SystemExit(main())
