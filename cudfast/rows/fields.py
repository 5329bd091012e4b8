"""Checks of the fields of options: each raises an error that names the field and the expected values."""

from __future__ import annotations

import difflib
import math

import numpy as np

NUMBERS = (int, float, np.integer, np.floating)

# Temperatures outside give practically the loss at the ends, and e^(x / tau) or tau^2 would leave the range of f32.
TEMPERATURES = (1e-4, 1e4)


def number(owner: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Checks that a field is a finite number in [low, high], or (low, high] with open_low."""
    value = getattr(owner, name)
    kind = type(owner).__name__
    if isinstance(value, bool) or not isinstance(value, NUMBERS):
        raise TypeError(f"{kind}({name}=...): expected a number, got {type(value).__name__}")
    inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
    if not inside:
        left = "(" if open_low else "["
        right = f"{high:g}]" if math.isfinite(high) else "inf)"
        hint = "; for cross-entropy alone, pass kd_weight=0" if name == "temperature" and value == 0 else ""
        raise ValueError(f"{kind}({name}={value}): expected a finite number in {left}{low:g}, {right}{hint}")
    if not isinstance(value, (int, float)):  # numpy's numbers, which JSON cannot represent
        object.__setattr__(owner, name, float(value))


def choice(owner: object, name: str, allowed: tuple[str, ...]) -> None:
    """Checks that a field is one of some words."""
    value = getattr(owner, name)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{type(owner).__name__}({name}={value!r}): expected one of {', '.join(map(repr, allowed))}{hint}"
        )


def integer(owner: object, name: str) -> None:
    """Checks that a field is an int of 64 bits."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{type(owner).__name__}({name}=...): expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{type(owner).__name__}({name}={value}): expected an int of 64 bits, as labels are")


def flag(owner: object, name: str) -> None:
    """Checks that a field is a bool."""
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}({name}=...): expected a bool, got {type(value).__name__}")
