"""How a measurement is taken: time, memory, machine, worker processes, records."""
