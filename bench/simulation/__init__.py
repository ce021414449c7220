"""Training steps of many clients: a PEFT loop, this library one by one and at once, vmap, and the bare base model."""
