"""The cost model of `fed.experiments.costs` against runs, and what a server does by the number of its clients."""
