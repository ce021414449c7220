"""A light simulator of federated fine-tuning over clients that afford different LoRA ranks.

The parts are modules to import by name: `fed.config`, `fed.data`, `fed.models`, `fed.simulate`, `fed.report`;
`python -m fed` is the command line.
"""
