"""Turn saved results into tables and pictures: `python -m bench.report`."""

from bench.report.command import main

if __name__ == "__main__":
    raise SystemExit(main())
