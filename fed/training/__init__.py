"""How clients train: one by one, or several in one forward and backward."""
