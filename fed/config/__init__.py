"""The configuration of a run: typed and validated settings, read from TOML and written to it.

On the command line and in error messages keys are written with dots: `train.learning_rate` is `learning_rate` in the
TOML table `[train]`.
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
