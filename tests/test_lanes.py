"""What lanes add up together is the same number in each of them: as PTX for sm_90, of rows that are read piecemeal.

A sum over lanes is a butterfly: each lane adds the other's value to its own. Where its own is a product, the compiler
makes one multiply-add of both, which does not round the product; the other lane gets it rounded. So no multiply-add may
have an operand from another lane, and no addition may have one beside a product, from which ptxas would make one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, sys
from cudfast.backends.triton import compiled
for variant in compiled.VARIANTS:
    if variant.name in sys.argv[1:]:
        print(json.dumps([variant.name, compiled.compile(variant, "bf16", "sm_90", 50_257).asm["ptx"]]))
"""
PLANTED = """
import json, sys
import triton, triton.language as tl
from triton.compiler import ASTSource
from cudfast.backends.triton.compiled import TARGETS
from cudfast.backends.triton.sets import in_thread, zero_beside

@triton.jit
def kernel(x_ptr, out, n, zero, WITH: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + n + tl.arange(0, BLOCK)).to(tl.float32)
    square = zero_beside(zero) + x * x if WITH else x * x
    tl.store(out + tl.arange(0, BLOCK // 8), in_thread(square, BLOCK, 8))

signature = {"x_ptr": "*bf16", "out": "*fp32", "n": "i32", "zero": "fp32", "WITH": "constexpr", "BLOCK": "constexpr"}
for name in ("without", "with"):
    source = ASTSource(kernel, signature, constexprs={"WITH": name == "with", "BLOCK": 2048})
    options = {"num_warps": 8, "enable_fp_fusion": True}
    print(json.dumps([name, triton.compile(source, target=TARGETS["sm_90"], options=options).asm["ptx"]]))
"""


def compiled(folder: Path, code: str, *names: str) -> dict[str, str]:
    """PTX by name, from a process in which Triton compiles. It reads kernels from a file."""
    script = folder / "script.py"
    script.write_text(code)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    found = subprocess.run(
        [sys.executable, str(script), *names], check=True, capture_output=True, text=True, env=environment
    )
    return dict(json.loads(line) for line in found.stdout.splitlines())


def unequal(ptx: str) -> list[str]:
    """Instructions whose result would differ between the lanes of a butterfly."""
    shuffled, products, found = set[str](), set[str](), []
    for line in ptx.splitlines():
        instruction = re.match(r"\s+(?:@!?%p\d+\s+)?([a-z][\w.]*)\s+(.*);", line)
        if not instruction:
            continue
        name, operands = instruction.groups()
        registers = re.findall(r"%\w+", operands)
        outputs = len(re.findall(r"%\w+", operands.split("}")[0])) if operands.startswith("{") else 1
        into, of = set(registers[:outputs]), set(registers[outputs:])
        if name.startswith("shfl.sync.bfly"):
            shuffled.add(registers[0])
        elif name.startswith("mov"):
            for kind in (shuffled, products):
                kind |= into if of & kind else set()
        elif re.match(r"mul\.(rn\.)?f", name):
            products |= into
        elif of & shuffled and (name.startswith("fma") or (of & products and re.match(r"(add|sub)\.(rn\.)?f", name))):
            found.append(line.strip())
    return found


def test_the_fault_is_seen_where_it_is_planted(tmp_path: Path) -> None:
    found = compiled(tmp_path, PLANTED)
    assert all("shfl.sync.bfly" in ptx for ptx in found.values())
    assert unequal(found["without"])
    assert not unequal(found["with"])


def test_lanes_hold_the_same_sums(tmp_path: Path) -> None:
    """With V = 50,257, of which 16 is no divisor, the lanes of a row's chunk share it."""
    names = (
        "student, fused",
        "projected, fused",
        "projected, state",
        "projected, temperature",
        "projected, tempered state",
    )
    found = compiled(tmp_path, COMPILE, *names)
    assert set(found) == set(names)
    for name, ptx in found.items():
        assert "shfl.sync.bfly" in ptx
        assert not unequal(ptx), name
