"""The operators' titles in tables and pictures."""

from typing import NamedTuple


class Title(NamedTuple):
    """An operator's title above a table, and its short form for columns and panels."""

    head: str
    short: str


TITLES = {
    "forward": Title("Forward", "forward"),
    "forward_backward": Title("Forward + backward", "forward + backward"),
    "fold": Title("Fold", "fold"),
    "dropout": Title("LoRA dropout", "dropout"),
    "mixed_forward": Title("Mixed precision, forward", "mixed, forward"),
    "mixed": Title("Mixed precision, forward + backward", "mixed"),
    "projections_forward": Title("Projections of one input, forward", "projections, forward"),
    "projections": Title("Projections of one input, forward + backward", "projections"),
    "fold_out": Title("Fold out of place", "fold out of place"),
    "fold_many": Title("Fold of many weights", "fold of many"),
}
