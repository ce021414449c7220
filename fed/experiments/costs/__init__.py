"""What a federated run costs, from its configuration and the model's shapes: work, memory, traffic, time and disk."""
