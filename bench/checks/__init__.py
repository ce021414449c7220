"""Is a result right: inputs, bounds, and every form of the operators against fp64."""
