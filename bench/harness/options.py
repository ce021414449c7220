"""Types of command-line options."""

import argparse


def at_least(least: int, text: str) -> int:
    """Return a whole number; raises what argparse reports if it is smaller than `least`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
    return int(text)
