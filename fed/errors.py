"""The error a person at the command line sees, and the exit statuses."""

# What a command returns for what it cannot use, and where Ctrl-C ended it.
BAD_INPUT, INTERRUPTED = 2, 130


class FedError(ValueError):
    """A configuration, data set or model that cannot be used: one line that says what would be right."""
