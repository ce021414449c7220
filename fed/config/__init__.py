"""A run's configuration: typed, validated once, read from TOML and written back to it.

Keys are named with dots on the command line and in error messages: `train.learning_rate` is `learning_rate` in the TOML
table `[train]`.
"""

from fed.config.loader import apply, flat, load, load_saved, parse, preset_names, renamed, settings_of, table, write
from fed.config.run import CompareConfig, RunConfig

__all__ = [
    "CompareConfig",
    "RunConfig",
    "apply",
    "flat",
    "load",
    "load_saved",
    "parse",
    "preset_names",
    "renamed",
    "settings_of",
    "table",
    "write",
]
