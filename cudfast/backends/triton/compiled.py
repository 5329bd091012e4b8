"""The machine code of the kernels' main loops, also for devices that are not present."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...inspect.machine import Loop, Machine, listings, loop_of, resources
from . import projected, search, student, teacher
from .launch import TWO_PROGRAMS, Columns, Given, Matrix, Results, Scales, Sets, plan
from .pieces import Sweep

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}  # bytes


class Variant(NamedTuple):
    """A kernel with its constants, and the arguments that are None; all others are given."""

    name: str
    kernel: Any
    constants: dict[str, object]
    absent: tuple[str, ...]
    exponentials: int  # of the method per element
    rows_read: int  # arrays of N V elements that the main loops read in all
    rows_written: int
    looks: int  # main loops: number of passes over a row
    types: dict[str, str]  # of arguments; "*logits" points to logits, an argument that is not named is an i32
    threads: int = 0  # of a program; 0: those of the plan


_GROUPS: dict[str, Any] = dict.fromkeys(("logits", "student", "teacher", "gradient"), Matrix)
_GROUPS |= {"given": Given, "scales": Scales, "results": Results, "sets": Sets, "columns": Columns}
_TYPES = {"pointer": "*logits"}
_TYPES |= dict.fromkeys(("weight", "temperatures", "settings", "coefficients", "divisors", "loss", "parts"), "*fp64")
_TYPES |= {"labels": "*i64", "top1": "*i64", "sums": "*compute", "upstream": "*compute"}
_TYPES |= dict.fromkeys(("bounds", "work"), "*fp64")
_TYPES |= dict.fromkeys(("near_offsets", "near", "wrong_offsets", "wrong"), "*i64")
_READ = ("weight", "temperatures", "coefficients", "parts")  # absent in kernels that read the state
_VECTORS = (*_READ, "upstream")
_STUDENT = {"P": 2, "ONES": 1, "CLIP": 1, "KINDS": (0, 1)}
_PROJECTED = {"P": 2, "ONES": 1, "KINDS": (0, 1)}
_TEACHER = {"KINDS": (1, 2, 4)}


def _flags(fold: bool, write: bool) -> dict[str, object]:
    return {"SWEEP": Sweep(fold, False, write)}


def _projected(fold: bool, again: bool, write: bool, entropy: bool) -> dict[str, object]:
    return {**_PROJECTED, "SWEEP": projected.ProjectedSweep(fold, again, write, entropy, True)}


_WHOLE, _WITHOUT_STATE = student.student_rows, (*_VECTORS, "sums")
_SETS = projected.projected_rows
_NEAR = (*_VECTORS, "wrong_offsets")  # absent: a list of near classes, the top-1 is wrong
VARIANTS = tuple(
    Variant(*fields, _TYPES)  # type: ignore[call-arg, var-annotated]
    for fields in (
        ("student, fused", _WHOLE, _STUDENT | _flags(True, True), _WITHOUT_STATE, 4, 4, 1, 2),
        ("student, state", _WHOLE, _STUDENT | _flags(True, False), _VECTORS, 2, 2, 0, 1),
        ("student, gradient", _WHOLE, _STUDENT | _flags(False, True), _READ, 2, 2, 1, 1),
        ("student, part of a row", student.student_parts, {"P": 2, "ONES": 1}, ("weight", "temperatures"), 2, 2, 0, 1),
        ("projected, fused", _SETS, _projected(True, False, True, False), _NEAR, 4, 4, 1, 2),
        ("projected, state", _SETS, _projected(True, False, False, True), _NEAR, 2, 2, 0, 1),
        ("projected, temperature", search.temper_rows, {"TOP1": True, "STUDENT": 11}, _NEAR, 1, 1, 0, 1),
        ("projected, tempered state", _SETS, _projected(False, True, False, True), _NEAR, 2, 2, 0, 1),
        ("projected, gradient", _SETS, _projected(False, False, True, False), (*_READ, "wrong_offsets"), 2, 2, 1, 1),
        ("teacher, fused", teacher.teacher_rows, _TEACHER | _flags(True, True), _WITHOUT_STATE, 2, 2, 1, 2),
        ("teacher, state", teacher.teacher_rows, _TEACHER | _flags(True, False), _VECTORS, 1, 1, 0, 1),
        ("teacher, gradient", teacher.teacher_rows, _TEACHER | _flags(False, True), _READ, 1, 1, 1, 1),
        ("teacher, part of a row", teacher.teacher_parts, {}, ("weight",), 1, 1, 0, 1),
    )
)


def compile(variant: Variant, dtype: str, target: str, classes: int = 32_000) -> Any:
    """The compiled kernel for logits of `dtype` with rows of `classes` columns, one behind the other."""
    wide = dtype == "fp64"
    cut = plan(8192, classes, wide, 132)
    names = variant.kernel.arg_names
    known = {"R": tl.float64 if wide else tl.float32, "BLOCK": cut.block}
    constants: dict[Any, object] = {name: known[name] for name in names if name in known}
    constants |= {name: value for name, value in variant.constants.items() if name in names}
    attributes = {}

    def of(name: str, path: tuple[int, ...]) -> str:
        """The type of an argument; its constant or its alignment go into the tables above."""
        if name in constants:
            return "constexpr"
        if name in variant.absent:
            constants[path] = None
            return "constexpr"
        annotated = variant.kernel.params[path[0]].annotation_type if len(path) == 1 else ""
        given = variant.types.get(name) or annotated or "i32"
        given = given.replace("logits", dtype).replace("compute", "fp64" if wide else "fp32")
        rows = name in ("V", "classes", "padded", "stride", "n_cols") or name.endswith("_stride")
        aligned = (rows and classes % 16 == 0) or name in ("outer", "chunk", "coefficient_step", "step")
        if given.startswith("*") or (aligned and given == "i32"):
            attributes[path] = [["tt.divisibility", 16]]
        return given

    signature: dict[str, Any] = {}
    for index, name in enumerate(names):
        group = None if name in variant.types else _GROUPS.get(name)
        if group is None:
            signature[name] = of(name, (index,))
        else:
            signature[name] = group(*(of(field, (index, i)) for i, field in enumerate(group._fields)))
    source = ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)
    warps = max(1, (variant.threads or cut.threads) // TARGETS[target].warp_size)
    options: dict[str, object] = {"num_warps": warps, "enable_fp_fusion": True}
    if variant.kernel is projected.projected_rows:
        options |= TWO_PROGRAMS[TARGETS[target].backend]
    return triton.compile(source, target=TARGETS[target], options=options)


def _loops(code: list[tuple[int, str]], jumps: Iterable[tuple[int, int]], exponential: str) -> list[list[str]]:
    """Bodies of the innermost loops with exponentials, without code that is mostly skipped; `jumps` are (from, to).

    A loop inside them, over the few members of a set, is mostly skipped as well.
    """
    jumps = list(jumps)
    kept: list[tuple[int, int]] = []
    inner: list[tuple[int, int]] = []
    for low, high in sorted(((to, at) for at, to in jumps if to <= at), key=lambda span: span[1] - span[0]):
        if any(low <= a and b <= high for a, b in kept):
            continue
        makes = any(low <= at <= high and exponential in text for at, text in code)
        (kept if makes else inner).append((low, high))

    def skipped(at: int, low: int, high: int) -> bool:
        return any(low <= start < at < end <= high for start, end in jumps) or any(
            low <= start <= at <= end <= high for start, end in inner
        )

    return [
        [text for at, text in code if low <= at <= high and not skipped(at, low, high)] for low, high in sorted(kept)
    ]


def nvidia(compiled: Any) -> Machine:
    """The machine code in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (usage,), (code,) = resources(file.name).values(), listings(file.name).values()
    bodies = _loops(code.instructions, code.jumps, "MUFU.EX2")
    threads = compiled.metadata.num_warps * 32
    return Machine(usage["REG"], usage["STACK"], compiled.metadata.shared, threads, tuple(map(loop_of, bodies)))


_AMD_WIDTHS = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _amd_loop(body: list[str]) -> Loop:
    counts = Counter[str]()
    widths = []
    for text in body:
        if found := re.match(
            r"(?:global|buffer)_(load|store)_(?:\w+?_)?(ubyte|byte|ushort|short|dword(?:x\d)?)\b", text
        ):
            counts[found[1]] += _AMD_WIDTHS[found[2]]
            widths.append(_AMD_WIDTHS[found[2]])
        counts["exp"] += text.startswith("v_exp_f32")
    return Loop(len(body), counts["exp"], counts["load"], counts["store"], min(widths, default=0))


def amd(compiled: Any) -> Machine:
    """The machine code in the assembly."""
    labels: dict[str, int] = {}
    code: list[tuple[int, str]] = []
    jumps: list[tuple[int, str]] = []
    text = compiled.asm["amdgcn"]
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\t([a-z]\w+.*)", line):
            if branch := re.match(r"s_c?branch\w*\s+(\.LBB\w+)", instruction[1]):
                jumps.append((len(code), branch[1]))
            code.append((len(code), instruction[1]))
    bodies = _loops(code, ((at, labels[to]) for at, to in jumps), "v_exp_f32")
    loops = tuple(map(_amd_loop, bodies))

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    stack = number("private_segment_fixed_size") + number("vgpr_spill_count")
    return Machine(number("vgpr_count"), stack, compiled.metadata.shared, compiled.metadata.num_warps * 64, loops)


def machine(variant: Variant, dtype: str, target: str, classes: int = 32_000) -> Machine:
    """Compiles a kernel and reads its machine code.

    Main loops are those whose accesses are all 16 bytes wide. The gathers of a set are not, and a main loop that lost
    its width would be missing in `loops`. The second loop of the temperature search, for its last sweeps, is left out.
    """
    compiled = compile(variant, dtype, target, classes)
    found = amd(compiled) if TARGETS[target].backend == "hip" else nvidia(compiled)
    wide = tuple(loop for loop in found.loops if loop.narrowest == 16)
    return found._replace(loops=wide[: variant.looks])
