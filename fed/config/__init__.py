"""The configuration of a run: typed and validated settings, read from TOML and written to it.

On the command line and in error messages keys are written with dots: `train.learning_rate` is `learning_rate` in the
TOML table `[train]`.
"""

from fed.config.data import CHAT
from fed.config.fields import why_no_path
from fed.config.loader import (
    EARLIER,
    apply,
    completed,
    flat,
    load,
    load_saved,
    parse,
    preset_names,
    renamed,
    settings_of,
    table,
    write,
)
from fed.config.paths import PATHS, located, same_setting
from fed.config.run import MOST_RUNS, CompareConfig, RunConfig, quantized_fault
from fed.config.toml_files import bad_character, parse_toml, read_toml_text, shown

__all__ = [
    "CHAT",
    "EARLIER",
    "MOST_RUNS",
    "PATHS",
    "CompareConfig",
    "RunConfig",
    "apply",
    "bad_character",
    "completed",
    "flat",
    "load",
    "load_saved",
    "located",
    "parse",
    "parse_toml",
    "preset_names",
    "quantized_fault",
    "read_toml_text",
    "renamed",
    "same_setting",
    "settings_of",
    "shown",
    "table",
    "why_no_path",
    "write",
]
