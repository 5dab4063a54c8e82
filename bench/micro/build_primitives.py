"""Builds bench/micro's C++ primitives, `_micro`, and loads them: in seconds where the extension was built in build/."""

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    """The module as of the sources that lie here now; RuntimeError with the compiler's words if it cannot be built."""
    folder = _build_folder()
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    if not (folder / "CMakeCache.txt").exists():
        configure.append("-DFLASHMOE_CUDA=OFF")
    _run(configure)
    _run(["cmake", "--build", folder, "--target", "_micro"])
    path = folder / f"_micro{sysconfig.get_config_var('EXT_SUFFIX')}"
    specification = importlib.util.spec_from_file_location("_micro", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _build_folder() -> Path:
    """Where setup.py built last for this interpreter, so that the core is compiled already; else one of our own."""
    name = f"{sys.implementation.cache_tag}-{platform.machine()}"
    built = [cache.parent for cache in (ROOT / "build").glob(f"{name}-*/CMakeCache.txt") if _is_as_shipped(cache)]
    return max(built, key=lambda folder: folder.stat().st_mtime, default=ROOT / "build" / f"{name}-micro")


def _is_as_shipped(cache: Path) -> bool:
    """Optimised, not slowed down by a sanitizer, and of this checkout, which may have been moved or copied."""
    lines = cache.read_text().splitlines()
    wanted = ("CMAKE_BUILD_TYPE:STRING=Release", "FLASHMOE_SANITIZE:STRING=", f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}")
    return all(line in lines for line in wanted)


def _tool(name: str) -> str:
    """This interpreter's, for a virtual environment need not be active, else the one on PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    program = str(beside) if beside.exists() else shutil.which(name)
    if program is None:
        raise RuntimeError(f"bench/micro is built with {name}, which was not found: `pip install {name}`")
    return program


def _run(command: list) -> None:
    command = [_tool(command[0]), *map(str, command[1:])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
