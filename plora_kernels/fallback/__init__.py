"""The operators in plain torch, for devices and dtypes the kernels do not serve."""
