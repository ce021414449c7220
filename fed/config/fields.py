"""Types of numbers and the pydantic settings that all tables of the configuration use."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, lt=1)]
FractionOrNone = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# Tables of the configuration are immutable, do not convert types, and refuse unknown keys.
TABLE = ConfigDict(frozen=True, extra="forbid", strict=True)
