"""The round loop: draw clients, start them, train them, aggregate their updates, measure and save."""
