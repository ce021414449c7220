"""The error that the command line reports to its user, and the exit statuses."""

# Exit statuses of a command for unusable input (a FedError), and after Ctrl-C.
BAD_INPUT, INTERRUPTED = 2, 130


class FedError(ValueError):
    """An error in a configuration, data set or model; its message is one line that says what would be right."""
