"""Measuring block sizes on the present device."""
