"""Block sizes measured for the device at hand."""
