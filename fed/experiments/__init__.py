"""One run or a plan of runs, from a configuration to files on disk."""
