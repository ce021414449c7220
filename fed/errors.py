"""The error a person at the command line sees."""


class FedError(ValueError):
    """A configuration, data set or model that cannot be used: one line that says what would be right."""
