"""Where NVSHMEM's library is looked for, and what is said of one that does not do: with libraries made here.

Each in a process of its own, since a library that is loaded once is found there ever after.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_world import fresh_environment

from flashmoe import nvshmem

compiler = next((found for name in ("cc", "gcc", "g++", "c++") if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.skipif(compiler is None, reason="needs a C compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch for CUDA maps its own copy in every process"),
]
NAME = "libnvshmem_host.so.3"
VERSION = "void nvshmemx_vendor_get_version_info(int* a, int* b, int* c) { *a = %s; *b = %s; *c = %s; }\n"
# What this package calls; only the question for the state is harmless.
CALLS = """
#include <stdlib.h>
int nvshmemx_init_status(void) { return 0; }
""" + "".join(
    f"void {name}(void) {{ abort(); }}\n" for name in (
        "nvshmemx_get_uniqueid", "nvshmemx_set_attr_uniqueid_args", "nvshmemx_hostlib_init_attr",
        "nvshmemx_hostlib_finalize", "nvshmemx_cumodule_init", "nvshmemx_cumodule_finalize", "nvshmem_my_pe",
        "nvshmem_n_pes", "nvshmem_align", "nvshmem_free", "nvshmem_ptr", "nvshmem_barrier_all",
    )
)  # fmt: skip
LIBRARY = "from flashmoe import nvshmem\nfound = nvshmem.library()\nprint(found['version'], found['found'], found['path'])"


def make_library(folder: Path, version: tuple[int, int, int] | None, code: str = "") -> Path:
    folder.mkdir(parents=True)
    source = (VERSION % version if version else "") + code
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{NAME}", "-o", str(folder / NAME), "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True, env=os.environ | {"LC_ALL": "C"})
    return folder / NAME


def make_package(site: Path, version: tuple[int, int, int]) -> Path:
    """As pip leaves it."""
    text = ".".join(map(str, version))
    library = make_library(site / "nvidia" / "nvshmem" / "lib", version)
    about = site / f"nvidia_nvshmem_cu13-{text}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-nvshmem-cu13\nVersion: {text}\n")
    return library


def run(code: str, **variables: str) -> str:
    """What it prints, in a fresh interpreter; PYTHONPATH goes before the rest."""
    environment = fresh_environment()
    environment.pop("NVSHMEM_HOME", None)
    path = os.pathsep.join(filter(None, [variables.pop("PYTHONPATH", ""), environment["PYTHONPATH"]]))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables, "PYTHONPATH": path}, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr}"


def test_nvshmem_home_goes_before_the_package(tmp_path):
    package = make_package(tmp_path / "site", (3, 7, 2))
    home = make_library(tmp_path / "home" / "lib", (3, 9, 1))
    assert run(LIBRARY, PYTHONPATH=str(tmp_path / "site")) == f"3.7.2 a package {package}"
    both = {"PYTHONPATH": str(tmp_path / "site"), "NVSHMEM_HOME": str(tmp_path / "home")}
    assert run(LIBRARY, **both) == f"3.9.1 NVSHMEM_HOME {home}"


def test_what_is_mapped_already_goes_before_all(tmp_path):
    make_package(tmp_path / "site", (3, 7, 2))
    torchs = make_library(tmp_path / "torch", (3, 4, 5))
    code = f"import ctypes\nctypes.CDLL({str(torchs)!r})\n{LIBRARY}\nprint(open('/proc/self/maps').read().count('nvidia/nvshmem'))"
    told = run(code, PYTHONPATH=str(tmp_path / "site"), NVSHMEM_HOME=str(tmp_path)).splitlines()
    assert told == [f"3.4.5 mapped in this process before {torchs}", "0"], "never a second copy"


def test_a_home_without_a_library_is_an_error(tmp_path):
    make_package(tmp_path / "site", (3, 7, 2))
    told = run(LIBRARY, PYTHONPATH=str(tmp_path / "site"), NVSHMEM_HOME=str(tmp_path))
    assert f"RuntimeError: flashmoe: NVSHMEM_HOME is {tmp_path}, and its library cannot be loaded" in told


def test_a_library_that_is_none(tmp_path):
    make_library(tmp_path / "lib", None)
    told = run(LIBRARY, NVSHMEM_HOME=str(tmp_path))
    assert "is no NVSHMEM library that this build knows: no nvshmemx_vendor_get_version_info" in told


def test_no_library(tmp_path):
    hidden = "import importlib.metadata as m\ndef none(name): raise m.PackageNotFoundError(name)\nm.distribution = none\n"
    told = run(hidden + LIBRARY)
    assert "NVSHMEM's host library was not found" in told or "the loader's search" in told


def test_importing_and_computing_on_the_cpu_loads_nothing(tmp_path):
    make_package(tmp_path / "site", (3, 7, 2))
    code = """
import torch, flashmoe
x, ids = torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64)
flashmoe.fused_moe(x, ids, torch.ones(2, 1), torch.randn(1, 8, 8), torch.randn(1, 8, 4))
flashmoe.check()
print([line for line in open('/proc/self/maps') if 'site/nvidia/nvshmem' in line])
"""
    assert run(code, PYTHONPATH=str(tmp_path / "site")) == "[]"


INITIALIZE = """
from flashmoe import nvshmem
world = nvshmem.world()
for call in [world.unique_id] * 2 + [lambda: world.initialize(bytes(128), 0, 1, 0)] * 2:
    try:
        call()
    except RuntimeError as error:
        print(error)
print("alive", world.ready, world.finalize())
"""
built = pytest.mark.skipif(not nvshmem.is_built(), reason="needs a build with NVSHMEM's headers")


@built
@pytest.mark.parametrize("version", [(3, 3, 9), (4, 0, 0)])
def test_another_version_is_refused_and_not_called(tmp_path, version):
    make_library(tmp_path / "lib", version, CALLS)
    *errors, last = run(INITIALIZE, NVSHMEM_HOME=str(tmp_path)).splitlines()
    assert last == "alive False False" and len(errors) == 4
    for error in errors:
        assert f"NVSHMEM is {'.'.join(map(str, version))} in this process, and the host code of this build needs" in error


@built
def test_a_library_that_lacks_a_function(tmp_path):
    make_library(tmp_path / "lib", (3, 9, 9), CALLS.replace("nvshmem_align", "nvshmem_other"))
    assert "is no NVSHMEM library that this build knows: no nvshmem_align" in run(INITIALIZE, NVSHMEM_HOME=str(tmp_path))


@built
def test_without_a_driver_the_library_is_not_initialised_and_the_process_lives(tmp_path):
    make_library(tmp_path / "lib", (3, 99, 0), CALLS)
    code = INITIALIZE.replace("[world.unique_id] * 2 + ", "")
    told = run(code, NVSHMEM_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="").splitlines()
    assert told[-1] == "alive False False" and len(told) == 3
    assert all("needs a GPU: there is none here, or no CUDA driver" in line for line in told[:-1])
