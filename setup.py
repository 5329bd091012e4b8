"""Builds the native core with CMake. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake. A failed build leaves a package that works without the native core and knows why."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        package.mkdir(parents=True, exist_ok=True)
        note = package / "_native_missing.txt"
        note.unlink(missing_ok=True)
        try:
            try:
                self.run_cmake(package)
            except subprocess.CalledProcessError as error:
                if os.environ.get("CUDFAST_CUDA", "") != "":  # somebody decided
                    raise
                print(f"cudfast: the build failed ({error}); once more without CUDA", file=sys.stderr)
                self.run_cmake(package, "-DCUDFAST_CUDA=0")
        except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
            if os.environ.get("CUDFAST_REQUIRE_NATIVE") == "1":
                raise
            note.write_text(f"{error}\n")
            print(f"cudfast: the native core was not built, the reference backend remains: {error}", file=sys.stderr)

    def run_cmake(self, package: Path, *options: str) -> None:
        import pybind11

        compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if compiler is None or shutil.which(compiler.split()[0]) is None:
            raise RuntimeError(f"no C++ compiler found (looked for {compiler or 'c++, g++, clang++'})")
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
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), *jobs], check=True)
        shutil.copy2(next(build.glob("_native*.so")), package)
        # setuptools carries the extension that it knows to where an editable package lives, and no other.
        home = ROOT / "cudfast" if self.editable_mode else package
        for stale in home.glob("_cuda*.so"):
            stale.unlink()
        for cuda in build.glob("_cuda*.so"):  # when there is an nvcc
            shutil.copy2(cuda, home)


setup(ext_modules=[Extension("cudfast._native", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
