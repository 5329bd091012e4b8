"""Instructions that compute values of values: no memory, no other thread.

Arguments and results are numpy arrays, a value for each thread, or numbers. bfloat16 is computed in float32 and rounded
when it is written; a predicate is a bool. Correctly rounded instructions are so here, but for fma in float64, whose
product has the 64 bits of a long double. The approximate ones (ex2, rcp, lg2) are better than a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .parse import Instruction

Array = Any  # of one value for each thread, of the type's dtype, or a number of it

UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    **{f"{kind}{8 * n}": dtype for n, dtype in UNSIGNED.items() for kind in "bu"},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.float32, "pred": np.bool_},
}
PAIRS = {"f16x2": "f16", "bf16x2": "bf16"}


def size_of(kind: str) -> int:
    """Bytes of a type in memory and in a register; 0: a predicate."""
    return 0 if kind == "pred" else int(kind.lstrip("bfsu")) // 8


class Value(NamedTuple):
    """What an instruction computes: its results' types, its sources' types, and one of the other."""

    results: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[..., Any]  # one array, or one for each result


def round_bfloat(x: Array) -> Array:
    """The bits of the nearest bfloat16 of a float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def widen_bfloat(bits: Array) -> Array:
    """The float32 of the bits of a bfloat16."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _halves(word: Array, kind: str) -> tuple[Array, Array]:
    """Of a pair, the low one first."""
    low, high = (np.asarray(word) & 0xFFFF).astype(np.uint16), (np.asarray(word) >> 16).astype(np.uint16)
    return (widen_bfloat(low), widen_bfloat(high)) if kind == "bf16" else (low.view(np.float16), high.view(np.float16))


def _pair(low: Array, high: Array, kind: str) -> Array:
    if kind == "bf16":
        bits = round_bfloat(low), round_bfloat(high)
    else:
        bits = tuple(np.asarray(x).astype(np.float16).view(np.uint16) for x in (low, high))  # type: ignore[assignment]
    return bits[0].astype(np.uint32) | bits[1].astype(np.uint32) << 16


def _fma(kind: str, modifiers: tuple[str, ...]) -> Callable[..., Array]:
    wide = np.longdouble if kind == "f64" else np.float64

    def compute(a: Array, b: Array, c: Array) -> Array:
        exact = np.asarray(a).astype(wide) * np.asarray(b).astype(wide) + np.asarray(c).astype(wide)
        result = exact.astype(TYPES[kind])
        if "rm" in modifiers:
            result = np.where(result > exact, np.nextafter(result, TYPES[kind](-np.inf)), result)
        return _saturated(result) if "sat" in modifiers else result

    return compute


def _saturated(x: Array) -> Array:
    return np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)).astype(np.float32)


def _divide(a: Array, b: Array) -> Array:
    """Of integers, towards zero."""
    return (a - np.fmod(a, b)) // b


def _product(kind: str, modifiers: tuple[str, ...]) -> tuple[str, Callable[..., Array]]:
    """The type and the function of an integer product: its low half, its high half, or all of it."""
    wide = kind[0] + str(16 * size_of(kind))
    if "wide" in modifiers:
        return wide, lambda a, b: np.asarray(a).astype(TYPES[wide]) * np.asarray(b).astype(TYPES[wide])
    if "hi" in modifiers:
        bits = 8 * size_of(kind)
        high = np.frompyfunc(lambda a, b: int(a) * int(b) >> bits, 2, 1)
        return kind, lambda a, b: np.asarray(high(a, b)).astype(TYPES[kind])
    return kind, np.multiply


_ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
_COMPARE["ge"] = np.greater_equal
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _comparison(how: str, floating: bool) -> Callable[[Array, Array], Array]:
    if not floating:
        return _COMPARE[_ORDER.get(how, how)]
    if how in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (how == "nan")
    compare, unordered = _COMPARE[how[:2]], len(how) == 3
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, compare(a, b))


def _setp(kind: str, modifiers: tuple[str, ...]) -> Value:
    if kind in PAIRS:
        compare = _comparison(modifiers[0], True)
        half = PAIRS[kind]

        def both(a: Array, b: Array) -> tuple[Array, ...]:
            return tuple(map(compare, _halves(a, half), _halves(b, half)))

        return Value(("pred", "pred"), ("b32", "b32"), both)
    compare = _comparison(modifiers[0], "f" in kind)
    logic = next((_LOGIC[m] for m in modifiers[1:] if m in _LOGIC), None)
    if logic is None:
        return Value(("pred", "pred"), (kind, kind), lambda a, b: ((r := compare(a, b)), ~r))
    return Value(
        ("pred", "pred"), (kind, kind, "pred"), lambda a, b, c: (logic(r := compare(a, b), c), logic(~r, c))
    )  # fmt: skip


_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _cvt(kinds: list[str], modifiers: tuple[str, ...]) -> Value:
    to, source = kinds[0], kinds[-1]
    rounded = next((_ROUND[m] for m in modifiers if m in _ROUND), None)
    if to in PAIRS:
        return Value(("b32",), ("f32", "f32"), lambda high, low: _pair(low, high, PAIRS[to]))
    if "f" in to:

        def convert(x: Array) -> Array:
            x = np.asarray(rounded(x) if rounded else x).astype(TYPES[to])
            return _saturated(x) if "sat" in modifiers else x

    elif "f" in source:
        info = np.iinfo(TYPES[to])

        def convert(x: Array) -> Array:
            x = np.asarray((rounded or np.trunc)(x)).astype(np.float64)
            inside = np.where(np.abs(x) < 2.0**64, x, 0)
            found = inside.astype(np.int64 if info.min else np.uint64).astype(TYPES[to])
            return np.where(x >= info.max, info.max, np.where(x <= info.min, info.min, found)).astype(TYPES[to])

    else:

        def convert(x: Array) -> Array:
            return np.asarray(x).astype(TYPES[to])

    return Value((to,), (source,), convert)


def _shift(kind: str, left: bool) -> Value:
    bits = 8 * size_of(kind)

    def compute(x: Array, by: Array) -> Array:
        fits = np.asarray(by) < bits
        by = np.minimum(by, bits - 1).astype(TYPES[kind])
        if left:
            return np.where(fits, x << by, 0)
        return x >> by if kind[0] == "s" else np.where(fits, x >> by, 0)

    return Value((kind,), (kind, "u32"), compute)


def _funnel(left: bool, wrap: bool) -> Value:
    def compute(low: Array, high: Array, by: Array) -> Array:
        by = (np.asarray(by) & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = np.asarray(high).astype(np.uint64) << 32 | np.asarray(low).astype(np.uint64)
        return ((both << by) >> 32 if left else both >> by).astype(np.uint32)

    return Value(("b32",), ("b32", "b32", "u32"), compute)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    both = np.asarray(b).astype(np.uint64) << 32 | np.asarray(a).astype(np.uint64)
    result = np.uint64(0)
    for i in range(4):
        nibble = (np.asarray(selector).astype(np.uint64) >> (4 * i)) & 15
        byte = (both >> (8 * (nibble & 7))) & 255
        sign = np.where(byte & 128, np.uint64(255), np.uint64(0))
        result = result | np.where(nibble & 8, sign, byte) << (8 * i)
    return result.astype(np.uint32)


def _insert(kind: str) -> Value:
    def compute(a: Array, b: Array, at: Array, length: Array) -> Array:
        a, b, at, length = (np.asarray(x).astype(np.uint64) for x in (a, b, at, length))
        mask = ((np.uint64(1) << length) - 1) << at
        return ((b & ~mask) | ((a << at) & mask)).astype(TYPES[kind])

    return Value((kind,), (kind, kind, "u32", "u32"), compute)


def _look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    terms = [
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if int(table) >> i & 1
    ]
    return np.bitwise_or.reduce(np.broadcast_arrays(*terms, np.uint32(0)))


def _flushed(compute: Callable[..., Array]) -> Callable[..., Array]:
    """With .ftz: subnormal arguments and results are 0."""

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x)

    return lambda *values: flush(compute(*map(flush, values)))


_FLOAT1: dict[str, Callable[..., Array]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
}  # fmt: skip
_FLOAT2: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
}
_INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "div": _divide, "rem": np.fmod, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_PLAIN = {"rn", "ftz", "lo", "wide", "hi", "approx", "full", "NaN", "sat", "rm"}  # modifiers of arithmetic


def _of_floats(opcode: str, kind: str, modifiers: tuple[str, ...]) -> Value | None:
    count, compute = 2, _FLOAT2.get(opcode)
    if opcode in ("min", "max") and "NaN" in modifiers:
        compute = {"min": np.minimum, "max": np.maximum}[opcode]
    elif opcode == "fma":
        count, compute = 3, _fma(kind, modifiers)
    elif opcode in _FLOAT1:
        count, compute = 1, _FLOAT1[opcode]
    rounded = {"rm", "sat"} & set(modifiers) and opcode != "fma"
    if compute is None or rounded or not set(modifiers) <= _PLAIN | {kind}:
        return None
    if kind in PAIRS:
        half, each = PAIRS[kind], compute
        return Value(("b32",), ("b32",) * count, lambda *x: _pair(*map(each, *(_halves(v, half) for v in x)), half))
    if opcode == "rcp" and "approx" in modifiers and kind == "f64":  # of its high word
        return Value(("f64",), ("f64",), lambda x: ((1 / x).view(np.uint64) & (0xFFFFFFFF << 32)).view(np.float64))
    return Value((kind,), (kind,) * count, _flushed(compute) if "ftz" in modifiers else compute)


def _of_integers(opcode: str, kind: str, modifiers: tuple[str, ...]) -> Value | None:
    if not set(modifiers) <= _PLAIN | {kind}:
        return None
    if opcode in ("mul", "mad"):
        result, product = _product(kind, modifiers)
        if opcode == "mul":
            return Value((result,), (kind, kind), product)
        return Value((result,), (kind, kind, result), lambda a, b, c: product(a, b) + c)
    if opcode in ("neg", "abs"):
        return Value((kind,), (kind,), _FLOAT1[opcode])
    return Value((kind,), (kind, kind), _INTEGER[opcode]) if opcode in _INTEGER else None


def value_of(instruction: Instruction) -> Value | None:
    """What it computes; None if it is no such instruction, or one that is not written here yet."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    kinds = [m for m in modifiers if m in TYPES or m in PAIRS]
    if not kinds:
        return None
    kind = kinds[-1]
    if opcode in _LOGIC:
        return Value((kind,), (kind, kind), _LOGIC[opcode])
    simple: dict[str, Callable[[], Value]] = {
        "not": lambda: Value((kind,), (kind,), np.invert),
        "selp": lambda: Value((kind,), (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b)),
        "setp": lambda: _setp(kind, modifiers),
        "cvt": lambda: _cvt(kinds, modifiers),
        "shl": lambda: _shift(kind, True),
        "shr": lambda: _shift(kind, False),
        "shf": lambda: _funnel("l" in modifiers, "wrap" in modifiers),
        "prmt": lambda: Value(("b32",), ("b32", "b32", "b32"), _permute),
        "bfi": lambda: _insert(kind),
        "lop3": lambda: Value(("b32",), ("b32", "b32", "b32", "b32"), _look_up),
    }
    if opcode in simple:
        return simple[opcode]()
    return (_of_floats if "f" in kind else _of_integers)(opcode, kind, modifiers)
