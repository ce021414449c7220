"""Checks of results: inputs, bounds, and every form of the operators against fp64."""
