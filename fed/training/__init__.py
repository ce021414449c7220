"""Local training of clients: one after another, or several in one forward and backward."""
