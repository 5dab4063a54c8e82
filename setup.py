"""Builds flashmoe._C with CMake; all else about the package stands in pyproject.toml.

CMAKE_ARGS adds arguments to the configuration, CMAKE_BUILD_PARALLEL_LEVEL limits the compilers that run at once.
"""

import hashlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, folder_attribute: str) -> str:
    """The program of the PyPI package `name` if this interpreter has it, else the one on PATH.

    In this order because a virtual environment need not be active to build in it, and because a distribution's
    cmake may be older than the one that the build requirements brought.
    """
    try:
        program = Path(getattr(importlib.import_module(name), folder_attribute)) / name
        if program.exists():
            return str(program)
    except (ImportError, AttributeError):
        pass
    program = shutil.which(name)
    if program is None:
        raise RuntimeError(f"flashmoe is built with {name}, which was not found: `pip install {name}`")
    return program


def build_folder(arguments: list[str]) -> Path:
    """Where CMake keeps its state between builds: one folder per interpreter, source folder and set of flags.

    Not setuptools' own build_temp, which an editable install throws away.
    """
    flags = [*arguments, *(f"{key}={os.environ.get(key)}" for key in ("CC", "CXX", "CXXFLAGS", "LDFLAGS"))]
    digest = hashlib.sha256("\n".join([str(ROOT), sys.base_prefix, *flags]).encode()).hexdigest()[:8]
    return ROOT / "build" / f"{sys.implementation.cache_tag}-{platform.machine()}-{digest}"


class BuildExtension(build_ext):
    def build_extension(self, extension):
        import pybind11

        output = Path(self.get_ext_fullpath(extension.name))
        arguments = [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        folder = build_folder(arguments)
        # These move with every isolated build, and with the name by which one interpreter was called (python,
        # python3), so they are told anew and are no part of the folder's name.
        moving = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', 'BIN_DIR')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        subprocess.run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *arguments, *moving], check=True)
        subprocess.run([cmake, "--build", folder, "--target", "_C"], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that runs the old library keeps it whole.
        fresh = output.with_suffix(".new")
        shutil.copy2(folder / output.name, fresh)
        fresh.replace(output)


class BuildPython(build_py):
    def run(self):
        # setuptools never removes from its staging folder: a module deleted since the last build would be shipped.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension("flashmoe._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
