"""One run or a comparison of runs, from a configuration to files on disk."""
