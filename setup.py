"""Builds the native core with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def run(*command: str) -> None:
    """Runs a command and shows what it printed. The error of one that fails has the first error of that, in English."""
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=english)
    print(done.stdout, flush=True)
    if done.returncode:
        patterns = r"(.*\berror: .*)", r"CMake Error.*\n((?s:.*?))(?:Call Stack|$)"
        found = next(filter(None, (re.search(pattern, done.stdout) for pattern in patterns)), None)
        reason = " ".join(found[1].split())[:300] if found else f"{command[0]} ended with {done.returncode}"
        raise ChildProcessError(f"the build failed ({reason}): install g++ or clang++, or set CXX to another compiler")


class CMakeBuild(build_ext):
    """Runs CMake. A failed build gives a package that works without the native core and contains the reason."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        package.mkdir(parents=True, exist_ok=True)
        note = package / "_native_missing.txt"
        note.unlink(missing_ok=True)
        try:
            try:
                self.run_cmake(package)
            except ChildProcessError as error:
                if os.environ.get("CUDFAST_CUDA", "") != "":  # the user has chosen
                    raise
                print(f"cudfast: {error}; once more without CUDA", file=sys.stderr)
                self.run_cmake(package, "-DCUDFAST_CUDA=0")
        except OSError as error:
            if os.environ.get("CUDFAST_REQUIRE_NATIVE") == "1":
                raise
            note.write_text(f"{error}\n", encoding="utf-8")
            print(f"cudfast: the native core was not built, the reference backend remains: {error}", file=sys.stderr)

    def run_cmake(self, package: Path, *options: str) -> None:
        import pybind11

        # Where the sources are used in place, what has not changed is not compiled again.
        build = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
        # A build folder that stays remembers what it was told.
        configure += [f"-D{name}={os.environ.get(name, '')}" for name in ("CUDFAST_CUDA", "CUDFAST_CUDA_ARCHS")]
        if ninja := shutil.which("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")  # in another place for every isolated build
        configure += [*os.environ.get("CMAKE_ARGS", "").split(), *options]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run(*configure)
        run("cmake", "--build", str(build), *jobs)
        shutil.copy2(next(build.glob("_native*.so")), package)
        # For an editable package, setuptools copies only the extension that is declared to the sources.
        home = ROOT / "cudfast" if self.editable_mode else package
        for stale in home.glob("_cuda*.so"):
            stale.unlink()
        for cuda in build.glob("_cuda*.so"):  # when there is an nvcc
            shutil.copy2(cuda, home)


setup(ext_modules=[Extension("cudfast._native", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
