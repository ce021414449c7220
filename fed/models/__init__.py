"""The base model of a run, and the one copy of it that all clients train on."""
