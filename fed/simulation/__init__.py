"""The round loop: sample, start, train, aggregate, measure, save."""
