"""Quantities as texts of three digits with their units."""

from __future__ import annotations

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def sized(value: float, unit: str) -> str:
    """Return a value with its unit and the prefix that leaves it three digits.

    >>> sized(1234567, "B"), sized(999.9, "B"), sized(0, "FLOP")
    ('1.23 MB', '1.00 kB', '0 FLOP')
    """
    if not value:
        return f"0 {unit}"
    place = 0
    while round(value, 2 if value < 10 else 1 if value < 100 else 0) >= 1000 and place < len(_PREFIXES) - 1:
        value, place = value / 1000, place + 1
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_PREFIXES[place]}{unit}"


def seconds(value: float) -> str:
    """Return a time as text.

    >>> seconds(0.0123), seconds(75), seconds(7200)
    ('12.3 ms', '75.0 s', '2.0 h')
    """
    if value < 1:
        return f"{1000 * value:.1f} ms"
    if value < 120:
        return f"{value:.1f} s"
    if value < 7200:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.1f} h" if value < 48 * 3600 else f"{value / 86400:,.0f} days"
