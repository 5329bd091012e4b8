"""The launches of both GPU backends, on CPU tensors: the kernels' own PTX, interpreted."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import os
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from cudfast import ClassSets
from cudfast.inspect.machine import run

from .machine import Launch, Machine
from .parse import Function, Module, parse

ROOT = Path(__file__).parents[2]


class Device(NamedTuple):
    """What the launches think the GPU has."""

    processors: int = 1
    shared: int = 227 << 10  # bytes of a block
    cluster: int = 8  # blocks


class Ran(NamedTuple):
    """A launch that was interpreted."""

    kernel: str
    blocks: int
    cluster: int
    threads: int
    instructions: int


class Interpreter:
    """Runs launches, and notes them. `seed`: see `Machine`; `change` makes another module of each."""

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed
        self.ran: list[Ran] = []
        self.change: Callable[[Module, Function], Module] = lambda module, entry: module

    def __call__(self, module: Module, suffix: str, launch: Launch) -> None:
        entry = module.entry(suffix)
        steps = Machine(self.change(module, entry), entry, launch, self.seed).run()
        self.ran.append(
            Ran(suffix or entry.name, launch.grid[0] * launch.grid[1], launch.cluster, launch.threads, steps)
        )


def ranges(values: Any) -> tuple[tuple[int, int], ...]:
    """Addresses of the memory of all tensors among values, of tuples in them, too."""
    if isinstance(values, torch.Tensor):
        storage = values.untyped_storage()
        return ((storage.data_ptr(), storage.data_ptr() + storage.nbytes()),)
    if isinstance(values, ClassSets):
        return ranges((values.offsets, values.indices))
    return tuple(pair for each in values for pair in ranges(each)) if isinstance(values, tuple) else ()


# CUDA C++: the PTX in the module that was built; launches come from a second module, compiled here.


@functools.cache
def _modules(target: str = "sm_90") -> tuple[str, ...]:
    """The PTX of each compilation in the module that was built; none if it holds no such PTX."""
    from cudfast.backends.cuda.compiled import _cuda

    with tempfile.TemporaryDirectory() as folder:
        run("cuobjdump", "-xptx", "all", str(Path(_cuda.__file__).resolve()), cwd=folder)
        return tuple(file.read_text() for file in sorted(Path(folder).glob(f"*.{target}.ptx")))


_parsed = functools.cache(parse)


def lacking_cuda() -> str:
    """Why the CUDA kernels cannot be interpreted, or ""."""
    try:
        return "" if _modules() else "the CUDA kernels were built without PTX for sm_90"
    except (ImportError, FileNotFoundError) as error:
        return str(error)


@functools.cache
def _recorder() -> ModuleType:
    """csrc/cuda without its kernels: a launch calls what `cudfast_recorder` points to."""
    sources = [ROOT / "tests/ptx/recorder.cpp", ROOT / "csrc/cuda/launch.cpp", ROOT / "csrc/cuda/bindings.cpp"]
    headers = [*sources, ROOT / "tests/ptx/recorder.h", *sorted((ROOT / "csrc").rglob("*.h"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in headers) + torch.__version__.encode()).hexdigest()
    folder = ROOT / "build" / "ptx"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"_cuda-{digest[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the suite wait for the one that compiles
        if not built.exists():
            _compile(sources, built)
    spec = importlib.util.spec_from_file_location("_cuda", built)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(sources: list[Path], built: Path) -> None:
    include = [
        ROOT / "csrc",
        ROOT / "tests/ptx",
        Path(torch.__file__).parent / "include",
        sysconfig.get_path("include"),
    ]
    common = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden"]
    common += [f"-I{path}" for path in include] + ["-DCUDFAST_X86", '-DCUDFAST_CUDA_ARCHS="90"']
    common += ['-DCUDFAST_LAUNCHER="recorder.h"']
    parts = [(sources[0], dtype) for dtype in (0, 2, 3, -1)] + [(source, 0) for source in sources[1:]]
    with tempfile.TemporaryDirectory() as folder:
        objects = [f"{folder}/{i}.o" for i in range(len(parts))]
        for (source, dtype), to in zip(parts, objects):
            subprocess.run([*common, f"-DCUDFAST_DTYPE={dtype}", "-c", str(source), "-o", to], check=True)
        subprocess.run([*common, "-shared", *objects, "-o", f"{folder}/built"], check=True)
        os.replace(f"{folder}/built", built)


_Recorder = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 5)


class _Calls:
    """The recorder's functions. The tensors of a call are the memory that its launches may touch."""

    def __init__(self, interpret: Interpreter, device: Device) -> None:
        self._module, self._interpret = _recorder(), interpret
        self._ranges: tuple[tuple[int, int], ...] = ()
        self._error: BaseException | None = None
        self._run = _Recorder(self._launch)  # kept alive with this
        library = ctypes.CDLL(self._module.__file__)
        library.cudfast_record(self._run, device.processors, device.shared, device.cluster)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found) or isinstance(found, type):
            return found

        def call(*values: Any) -> Any:
            self._ranges = ranges(values)
            try:
                return found(*values)
            except RuntimeError:
                if self._error is not None:
                    raise self._error from None
                raise

        return call

    def _launch(self, name: bytes, kernel: int, size: int, blocks: int, cluster: int, threads: int, shared: int) -> Any:
        symbol = name.decode().partition("_GLOBAL__N_1")[2]
        suffix = f"INS0_{symbol}EEvT_i"
        try:
            text = next(text for text in _modules() if suffix in text)
            arguments = ctypes.string_at(kernel, size) + cluster.to_bytes(4, "little")
            launch = Launch(arguments, (blocks, 1), threads, shared, cluster, self._ranges)
            self._interpret(_parsed(text), suffix, launch)
        except BaseException as error:  # C++ is between this and the caller
            self._error = error
            return ctypes.cast(ctypes.c_char_p(b"the interpreter raised an error"), ctypes.c_void_p).value
        return None


@contextlib.contextmanager
def cuda(interpret: Interpreter, device: Device) -> Iterator[None]:
    """backend="cuda" on CPU tensors is interpreted."""
    from cudfast.backends import cuda as backend

    before, backend._cuda = backend._cuda, _Calls(interpret, device)
    try:
        yield
    finally:
        backend._cuda = before


# Triton: its compiler's PTX for sm_90, from a process without TRITON_INTERPRET.


class _Utilities:
    """What Triton asks of a driver."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 4, "warpSize": 32}

    @staticmethod
    def load_binary(name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, _parsed(ptx.decode()), 0, 0, 1024

    @staticmethod
    def unload_module(module: object) -> None: ...


def _given(values: Iterable[Any], kinds: Iterable[Any]) -> list[tuple[Any, str]]:
    """Arguments that are no constants, and their types; those in tuples, too."""
    found: list[tuple[Any, str]] = []
    for value, kind in zip(values, kinds):
        if isinstance(kind, tuple):
            found += _given(value, kind)
        elif kind != "constexpr":
            found.append((value, kind))
    return found


def _arguments(module: Module, values: list[tuple[Any, str]]) -> bytes:
    """The layout of the kernel's parameters; those that Triton adds (scratch memory) are null."""
    data = b""
    parameters = module.entry().parameters
    for (_, size, alignment), (value, kind) in itertools.zip_longest(parameters, values, fillvalue=(0, "i64")):
        data += b"\0" * (-len(data) % alignment)
        if kind.startswith("*"):
            value, kind = value.data_ptr(), "i64"
        letter = {"fp32": "f", "fp64": "d"}.get(kind)
        data += struct.pack("<" + letter, value) if letter else int(value).to_bytes(size, "little", signed=value < 0)
    return data


def _triton_driver(interpret: Interpreter) -> Any:
    from triton.backends.compiler import GPUTarget

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self._kinds, self._metadata = list(source.signature.values()), metadata

        def __call__(self, x: int, y: int, z: int, stream: int, module: Module, *rest: Any) -> None:
            values = rest[4:]  # packed metadata, launch metadata, two hooks
            given = _given(values, self._kinds)
            threads, shared = 32 * self._metadata.num_warps, self._metadata.shared
            interpret(module, "", Launch(_arguments(module, given), (x, y), threads, shared, 1, ranges(values)))

    class Driver:
        utils, launcher_cls = _Utilities(), Launcher
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=None: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    return Driver()


def triton(interpret: Interpreter) -> None:
    """backend="triton" on CPU tensors is interpreted, for the rest of a process that has set TRITON_INTERPRET=0."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    from cudfast.backends import triton as backend

    driver.set_active(_triton_driver(interpret))
    CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()  # without ptxas, into a cache of its own
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "ptx" / "triton")
    backend.interpreted = lambda: True
