"""The base model a run starts from, and the one copy of it that all clients train on."""
