"""The interpreter of tests/ptx by itself: instructions with known answers, and hazards in kernels of a few lines."""

from __future__ import annotations

import math
import re
import struct

import numpy as np
import pytest

from .ptx.machine import Launch, Machine
from .ptx.memory import HazardError
from .ptx.parse import Module, parse

HEAD = """
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_param_0)
{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>;
 ld.param.u64 %d0, [kernel_param_0];
 mov.u32 %r0, %tid.x;
 shl.b32 %r1, %r0, 4;
 mov.u32 %r2, memory;
 add.s32 %r3, %r2, %r1; // the thread's 16 bytes
 xor.b32 %r4, %r1, 16;
 add.s32 %r4, %r4, %r2; // its neighbour's
 cvt.u64.u32 %d1, %r1;
 add.s64 %d2, %d0, %d1; // the thread's 16 bytes of global memory
 mov.u32 %r5, %cluster_ctarank;
 cvt.u64.u32 %d3, %r3;
 cvta.shared.u64 %d4, %d3;
 xor.b32 %r6, %r5, 1;
"""


def module(body: str) -> Module:
    return parse(HEAD + body + "\nret;\n}")


def run(body: str, threads: int = 64, cluster: int = 1, seed: int | None = None) -> np.ndarray:
    """Runs it on 16 bytes of global memory a thread, which hold the bytes' numbers, and returns those."""
    memory = np.arange(16 * threads, dtype=np.uint32).astype(np.uint8)
    start = memory.ctypes.data
    arguments, ranges = struct.pack("<Q", start), ((start, start + len(memory)),)
    found = module(body)
    Machine(found, found.entry(), Launch(arguments, (cluster, 1), threads, 16 * threads, cluster, ranges), seed).run()
    return memory


STORE, LOAD, BARRIER = "st.shared.b32 [%r3], %r0;", "ld.shared.b32 %r7, [%r4];", "bar.sync 0;"
COPY = "cp.async.cg.shared.global [%r3], [%d2], 16;"
ENDS = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
REMOTE = "mapa.u64 %d5, %d4, %r6;"


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (LOAD, "a read of shared memory that was not written"),
        (STORE + LOAD, "a read after a write without a barrier|a read of shared memory that was not written"),
        (STORE + BARRIER + "st.shared.b32 [%r4], %r0;" + LOAD, ""),
        (STORE + BARRIER + LOAD + "st.shared.b32 [%r3], %r0;", "a write after a read without a barrier"),
        (STORE + "st.shared.b32 [%r4], %r0;", "a write after a write without a barrier"),
        ("st.shared.b32 [%r2], %r0;", "two threads write different values|a write after a write"),
        (STORE + "bar.warp.sync -1;" + LOAD, ""),
        (COPY + "ld.shared.b32 %r7, [%r3];", "a read of a copy that was not waited for"),
        (COPY + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r7, [%r3];", "not waited for"),
        (COPY + "cp.async.commit_group; cp.async.wait_group 0; ld.shared.b32 %r7, [%r3];", ""),
        (COPY + "cp.async.wait_all;" + LOAD, "a read after a write without a barrier|was not waited for"),
        (COPY + "cp.async.wait_all;" + BARRIER + LOAD, ""),
        (COPY + STORE, "a write to where a copy goes"),
        (COPY, "a thread ends before its copies"),
        ("ld.global.b32 %r7, [%d2+1];", "an access of 4 bytes that is not aligned"),
        ("ld.global.v4.b32 {%r7, %r8, %r9, %r10}, [%d2+8];", "an access of 16 bytes that is not aligned"),
        ("ld.global.b32 %r7, [%d2+16];", "an access outside of the tensors"),
        ("st.shared.b32 [%r3+16], %r0;", "an access outside of the block's 1024 bytes"),
        (REMOTE, "a block that the cluster of 1 does not have"),
        ("setp.lt.u32 %p0, %r0, 7; @%p0 bar.sync 0;", "threads of a warp are missing"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bar.sync 0; @!%p0 bar.sync 1;", "all threads that are left wait"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra $end; bar.sync 0; $end:", ""),
    ],
)  # fmt: skip
def test_hazards(body: str, what: str, seed: int | None) -> None:
    if what:
        with pytest.raises(HazardError, match=what):
            run(body, seed=seed)
    else:
        run(body, seed=seed)


WRITES = "st.u32 [%d4], %r0;"
READS = REMOTE + "ld.u32 %r7, [%d5];"


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("body", "what"),
    [
        (WRITES + ENDS + READS + ENDS, ""),
        (WRITES + READS, "a read after a write without a barrier|not written|that has ended"),
        (WRITES + BARRIER + READS + ENDS, "a read after a write without a barrier|not written"),
        (WRITES + ENDS + READS + WRITES + ENDS, "a write after a read without a barrier|a read after a write"),
        (WRITES + "barrier.cluster.wait.aligned;", "without having arrived"),
        (WRITES + "barrier.cluster.arrive.aligned; barrier.cluster.arrive.aligned;", "a thread arrives twice"),
        (REMOTE + "cvta.to.shared.u64 %d6, %d5; st.shared.u32 [%d6], %r0;", "that is not in the cluster"),
    ],
)
def test_hazards_of_a_cluster(body: str, what: str, seed: int | None) -> None:
    if what:
        with pytest.raises(HazardError, match=what):
            run(body, cluster=2, seed=seed)
    else:
        run(body, cluster=2, seed=seed)


def test_a_block_that_has_ended() -> None:
    """A store into shared memory of a block whose threads are gone."""
    body = "setp.eq.u32 %p0, %r5, 1; @%p0 bra $end; mapa.u64 %d5, %d4, %r6; st.u32 [%d5], %r0; $end:"
    found = set()
    for seed in range(8):
        try:
            run(body, cluster=2, seed=seed)
        except HazardError as error:
            found.add(re.sub(":.*", "", str(error)))
    assert found == {"an access to shared memory of a block that has ended"}


def test_warps_run_in_random_order() -> None:
    """Both warps write one word of global memory: which is the last depends on the seed, and on it alone."""
    last = [run("st.global.u32 [%d0], %r0;", seed=seed)[0] // 32 for seed in range(12)]
    assert set(last) == {0, 1}
    assert last == [run("st.global.u32 [%d0], %r0;", seed=seed)[0] // 32 for seed in range(12)]


def bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize(
    ("instructions", "answer"),
    [
        ("mov.b32 %r7, 0x44332211; mov.b32 %r8, 0x88776655; prmt.b32 %r9, %r7, %r8, 0x7210;", 0x88332211),
        ("mov.b32 %r7, 0x80; prmt.b32 %r9, %r7, %r7, 0x8888;", 0xFFFFFFFF),
        ("mov.b32 %r7, 0xAB; mov.b32 %r8, -1; bfi.b32 %r9, %r7, %r8, 8, 8;", 0xFFFFABFF),
        ("mov.b32 %r7, -7; mov.b32 %r8, 2; div.s32 %r9, %r7, %r8;", (-3) & 0xFFFFFFFF),
        ("mov.b32 %r7, -7; mov.b32 %r8, 2; rem.s32 %r9, %r7, %r8;", (-1) & 0xFFFFFFFF),
        ("mov.b32 %r7, -7; shr.s32 %r9, %r7, 1;", (-4) & 0xFFFFFFFF),
        ("mov.b32 %r7, -7; shr.u32 %r9, %r7, 40;", 0),
        ("mov.b32 %r7, 1; mov.b32 %r8, 0x80000000; shf.l.wrap.b32 %r9, %r8, %r7, 1;", 3),
        ("mov.b32 %r7, 0xF0; mov.b32 %r8, 0xCC; mov.b32 %r9, 0xAA; lop3.b32 %r9, %r7, %r8, %r9, 0x96;", 0x96),
        ("mov.b32 %r7, -2; mul.wide.s32 %d7, %r7, 3; cvt.u32.u64 %r9, %d7;", (-6) & 0xFFFFFFFF),
        ("mov.b32 %r7, -2; mul.hi.u32 %r9, %r7, 3;", 2),
        ("mov.b32 %r7, -2; mad.lo.s32 %r9, %r7, 3, 10;", 4),
        ("mov.b32 %r7, 0f7FC00000; cvt.rzi.s32.f32 %r9, %r7;", 0),
        ("mov.b32 %r7, 0fC0200000; cvt.rni.s32.f32 %r9, %r7;", (-2) & 0xFFFFFFFF),
        ("mov.b32 %r7, 0f7F800000; cvt.rzi.s32.f32 %r9, %r7;", 0x7FFFFFFF),
        ("mov.b32 %r7, 0f7FC00000; cvt.sat.f32.f32 %r9, %r7;", 0),
        ("mov.b32 %r7, 0f3F80C000; cvt.rn.bf16.f32 %h1, %r7; cvt.f32.bf16 %r9, %h1;", 0x3F810000),
        ("mov.b32 %r7, 0f3F800000; mov.b32 %r8, 0f40000000; cvt.rn.bf16x2.f32 %r9, %r7, %r8;", 0x3F804000),
        ("mov.b32 %r7, 0f3F800000; mov.b32 %r8, 0f40000000; cvt.rn.f16x2.f32 %r9, %r7, %r8;", 0x3C004000),
        ("mov.b32 %r7, 0x3C004000; mov.b32 {%h1, %h2}, %r7; cvt.f32.f16 %r9, %h2;", bits(1.0)),
        ("mov.b32 %r7, 0f3F800001; fma.rn.f32 %r9, %r7, %r7, 0fBF800002;", bits(2.0**-46)),
        ("mov.b32 %r7, 0f3F800001; fma.rm.f32 %r9, %r7, %r7, 0f00000000;", 0x3F800002),
        ("mov.b32 %r7, 0f00400000; abs.ftz.f32 %r9, %r7;", 0),
        ("mov.b32 %r7, 0f7FC00000; max.f32 %r9, %r7, 0f3F800000;", bits(1.0)),
        ("mov.b32 %r7, 0fC0000000; ex2.approx.ftz.f32 %r9, %r7;", bits(0.25)),
        ("mov.b32 %r7, 0f7FC00000; setp.ltu.f32 %p1, %r7, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 1),
        ("mov.b32 %r7, 0f7FC00000; setp.lt.f32 %p1|%p2, %r7, 0f00000000; selp.b32 %r9, 1, 2, %p1;", 2),
        ("mov.b32 %r7, -1; setp.lo.u32 %p1, %r7, 1; selp.b32 %r9, 1, 2, %p1;", 2),
        ("mov.b64 %d7, 0d3FF0000000000001; fma.rn.f64 %d7, %d7, %d7, 0dBFF0000000000002; cvt.rn.f32.f64 %r9, %d7;", 0),
        ("shfl.sync.bfly.b32 %r9, %r0, 1, 31, -1; shfl.sync.down.b32 %r9, %r9, 4, 31, -1;", 5),
        ("redux.sync.add.s32 %r9, %r0, -1;", 31 * 16),
    ],
)
def test_instructions(instructions: str, answer: int) -> None:
    """%r9 of the first thread."""
    assert run(instructions + "st.global.u32 [%d2], %r9;")[:4].view(np.uint32)[0] == answer


def test_a_float64_product_is_nearly_exact() -> None:
    body = "mov.b64 %d7, 0d3FF5555555555555; fma.rn.f64 %d8, %d7, %d7, 0d3FE0000000000001; st.global.b64 [%d2], %d8;"
    x = struct.unpack("<d", struct.pack("<Q", 0x3FF5555555555555))[0]
    assert math.isclose(run(body)[:8].view(np.float64)[0], x * x + 0.5, rel_tol=2**-52)


def test_calls_and_jumps() -> None:
    """A function of a divergent half of the warp; a loop of as many rounds as the thread's number."""
    text = """
.func (.param .b32 back) twice(.param .b32 twice_param_0)
{
 .reg .b32 %r<3>;
 ld.param.u32 %r1, [twice_param_0];
 add.s32 %r2, %r1, %r1;
 st.param.b32 [back], %r2;
 ret;
}
""" + HEAD + """
 mov.b32 %r7, 0;
 mov.b32 %r8, %r0;
$loop:
 setp.eq.u32 %p1, %r8, 0;
 @%p1 bra $out;
 add.s32 %r7, %r7, 3;
 sub.s32 %r8, %r8, 1;
 bra $loop;
$out:
 setp.ge.u32 %p2, %r0, 16;
 @%p2 bra $end;
 {
 .param .b32 param0;
 st.param.b32 [param0], %r7;
 .param .b32 retval0;
 call.uni (retval0), twice, (param0);
 ld.param.b32 %r7, [retval0];
 }
$end:
 st.global.u32 [%d2], %r7;
 ret;
}"""  # fmt: skip
    found = parse(text)
    for seed in (None, 1):
        memory = np.zeros(16 * 64, np.uint8)
        start = memory.ctypes.data
        launch = Launch(struct.pack("<Q", start), (1, 1), 64, 64, 1, ((start, start + len(memory)),))
        Machine(found, found.entry(), launch, seed).run()
        index = np.arange(64)
        assert memory.view(np.uint32)[::4].tolist() == np.where(index < 16, 6 * index, 3 * index).tolist()


def test_what_it_does_not_have_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"tests/ptx has no mma\.sync: mma\.sync %r7, %r7"):
        run("mma.sync %r7, %r7;")
    with pytest.raises(NotImplementedError, match=r"barrier\.cluster\.arrive\.relaxed"):
        run("barrier.cluster.arrive.relaxed.aligned;", cluster=2)
