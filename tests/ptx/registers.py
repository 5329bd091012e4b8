"""Registers of a function, a value for each thread; and the threads that run an instruction together."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from .instructions import TYPES, UNSIGNED, Array, round_bfloat, size_of, widen_bfloat
from .parse import Function


class Active:
    """Threads that run together: a slice of the cluster's, and which of them."""

    def __init__(self, span: slice, mask: Array) -> None:
        self.span, self.mask = span, mask
        self.all = bool(mask.all())

    @functools.cached_property
    def threads(self) -> Array:
        """Their numbers in the cluster."""
        return np.flatnonzero(self.mask) + self.span.start

    def those(self, condition: Array) -> Active:
        """The ones of which a condition, of the slice, holds."""
        return Active(self.span, self.mask & condition)

    def assign(self, to: Array, values: Array) -> None:
        if self.all:
            to[self.span] = values
        else:
            np.copyto(to[self.span], values, where=self.mask, casting="unsafe")

    def of(self, values: Array) -> Array:
        """Their own, of a number or of values of the slice."""
        return np.broadcast_to(values, self.mask.shape)[self.mask]

    def spread(self, values: Array) -> Array:
        """The slice's, of their own; the others' are 0."""
        found = np.zeros(self.mask.shape, values.dtype)
        found[self.mask] = values
        return found


Reader = Callable[[Active], Array]  # values of the slice, or a number
Writer = Callable[[Active, Array], None]

_FLOAT = re.compile(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})")


def number(text: str) -> tuple[int, int] | None:
    """The bits of a literal and how many bytes it has, 0 for an integer; None for a name."""
    if found := _FLOAT.fullmatch(text):
        return int(found[1] or found[2], 16), 4 if found[1] else 8
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0), 0
    return None


class Frame:
    """Registers, junk until they are written, and parameters of a function that runs; nothing calls itself."""

    def __init__(self, function: Function, threads: int, special: Mapping[str, Array], symbols: Mapping[str, int]):
        self.function, self._threads = function, threads
        self._special, self._symbols = special, symbols
        self._arrays: dict[str, Array] = {}
        self.parameters: dict[tuple[str, int], Array] = {}  # of calls, in words of 8 bytes

    def parameter(self, name: str, word: int = 0) -> Array:
        if (name, word) not in self.parameters:
            self.parameters[name, word] = np.zeros(self._threads, np.uint64)
        return self.parameters[name, word]

    def _array(self, name: str) -> Array:
        if name not in self._arrays:
            known = self.function.registers
            size = known[name] if name in known else known[re.sub(r"\d+$", "", name)]
            self._arrays[name] = np.full(self._threads, -1 if size else True).astype(UNSIGNED[size] if size else bool)
        return self._arrays[name]

    def known(self, name: str) -> bool:
        """Whether it is a register."""
        return name in self.function.registers or re.sub(r"\d+$", "", name) in self.function.registers

    def reader(self, operand: str, kind: str) -> Reader:
        """Reads an operand as a type."""
        if operand.startswith("!"):
            inner = self.reader(operand[1:], kind)
            return lambda active: ~inner(active)
        size = size_of(kind)
        if operand in self._special or operand in self._symbols:
            found = np.asarray(self._special[operand] if operand in self._special else self._symbols[operand])
            values = found.astype(np.int64).astype(TYPES[kind])
            return lambda active: values[active.span] if values.ndim else values
        if (literal := number(operand)) is not None:
            bits, _ = literal
            value = np.array([bits & ((1 << 8 * size) - 1)], UNSIGNED[size]) if size else np.array([bool(bits)])
            scalar = (widen_bfloat(value) if kind == "bf16" else value.view(TYPES[kind]))[0]
            return lambda active: scalar
        array = self._array(operand)
        if size and array.itemsize != size:  # a part of a wider register
            return lambda active: array[active.span].astype(UNSIGNED[size]).view(TYPES[kind])
        if kind == "bf16":
            return lambda active: widen_bfloat(array[active.span])
        view = array.view(TYPES[kind])
        return lambda active: view[active.span]

    def writer(self, operand: str, kind: str) -> Writer:
        """Writes a result of a type."""
        if operand == "_":
            return lambda active, values: None
        array, size = self._array(operand), size_of(kind)
        if kind == "bf16":
            return lambda active, values: active.assign(array, round_bfloat(values))
        if size and array.itemsize != size:  # a wider register: by its sign, or by zeros
            wider = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{array.itemsize}")
            view = array.view(wider)
            whole = TYPES[kind] if kind[0] == "s" else UNSIGNED[size]
            return lambda active, values: active.assign(view, np.asarray(values).view(whole).astype(wider))
        view = array.view(TYPES[kind])
        return lambda active, values: active.assign(view, values)

    def address(self, operand: str) -> Reader:
        """Reads [name+offset]."""
        found = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert found, operand
        base, offset = found[1], np.uint64(int(found[2] or 0) & ((1 << 64) - 1))
        narrow = self.known(base) and self._array(base).itemsize == 4
        read = self.reader(base, "b32" if narrow else "b64")
        if narrow:
            return lambda active: (np.asarray(read(active)).astype(np.uint64) + offset) & np.uint64(0xFFFFFFFF)
        return lambda active: read(active) + offset
