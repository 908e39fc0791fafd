"""Builds the native runtime with CMake; everything else about the package stands in pyproject.toml.

``KVCLI_NATIVE=off`` leaves the kernels out (the reference backend remains). ``KVCLI_CUDA`` is ``auto`` (the default:
the CUDA library is built where nvcc is found), ``on`` or ``off``; ``KVCLI_CUDA_ARCHITECTURES`` narrows its list.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path("kvcli/runtime/csrc")
TARGET = Path("kvcli/runtime/lib")


class BuildNative(build_ext):
    """Runs CMake and puts the shared libraries into ``kvcli/runtime/lib``."""

    def run(self) -> None:
        """Build into the package's build folder, or beside the sources for an editable installation."""
        if os.environ.get("KVCLI_NATIVE", "auto") == "off":
            return
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.stderr.write("kvcli: no CMake, so no native kernels; the reference backend remains\n")
            return
        target = (TARGET if self.inplace else Path(self.build_lib) / TARGET).resolve()
        target.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("KVCLI_CUDA", "auto")
        wanted = cuda == "on" or (cuda == "auto" and shutil.which("nvcc") is not None)
        build = Path(self.build_temp).resolve() / ("cuda" if wanted else "cpu")
        options = ["-DCMAKE_BUILD_TYPE=Release", f"-DKVRT_CUDA={'ON' if wanted else 'OFF'}"]
        if architectures := os.environ.get("KVCLI_CUDA_ARCHITECTURES"):
            options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        if shutil.which("ninja"):
            options.append("-GNinja")
        subprocess.run([cmake, "-S", str(SOURCE), "-B", str(build), *options], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(target)], check=True)

    def get_outputs(self) -> list[str]:
        """Return nothing: the libraries are the package's data."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing, as above."""
        return {}


class PlatformWheel(bdist_wheel):
    """The libraries do not know Python, so one wheel serves every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags: any Python 3, no ABI, this platform."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("kvcli.runtime.lib", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
