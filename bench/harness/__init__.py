"""Measuring: time, memory, the machine, worker processes, records."""
