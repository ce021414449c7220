"""Types of numbers, and the base class of the configuration's tables."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

_LONGEST_PATH, _LONGEST_NAME = 4095, 255  # bytes, of Linux
_TINY = 1e-12


def _check_not_tiny(value: float) -> float:
    if value < _TINY:
        raise PydanticCustomError("tiny", "Input should be at least {least}", {"least": f"{_TINY:g}"})
    return value


def why_no_path(path: str) -> str:
    """Return what a path should be, if it is too long for any file to have, or ""."""
    if len(path.encode("utf-8", "surrogatepass")) > _LONGEST_PATH:
        return f"a path of at most {_LONGEST_PATH} bytes"
    if any(len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME for name in path.split("/")):
        return f"a path with names of at most {_LONGEST_NAME} bytes"
    return ""


def _check_path(path: str) -> str:
    """Return a path; raise pydantic's error if no file can have it."""
    if why := why_no_path(path):
        raise PydanticCustomError("path", "Input should be {why}", {"why": why})
    return path


Fraction = Annotated[float, Field(gt=0, lt=1)]
FractionOrNone = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000_000_000)]
# Within these limits sums and squares of a few stay finite and above 0 in fp32.
Positive = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False), AfterValidator(_check_not_tiny)]
# A rate that makes training diverge is a mistake that a run reports; this much is still a number in fp32.
LearningRate = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False), AfterValidator(_check_not_tiny)]
NotNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
PathName = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]


class Table(BaseModel):
    """A table of the configuration: it is immutable, does not convert types, and refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
