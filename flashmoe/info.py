"""What this installation is and what it runs on, for ``flashmoe info`` and for the records of ``flashmoe run``."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import _C, nvshmem
from ._version import __version__
from .cores import usable_cores
from .hosts import ucx_version
from .settings import Settings


def versions() -> dict[str, str | None]:
    """Of everything that a measurement may depend on; None: not installed."""
    return {
        "flashmoe": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "transformers": _version_of("transformers"),
        "triton": _version_of("triton"),
    }


def commit() -> str | None:
    """The commit of the checkout this package is imported from, ``-dirty`` with changes; None outside of one.

    Records of measurements are no changes: one must not make the next look as if it were of other code.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root)]
    described = subprocess.run([*git, "describe", "--always", "--abbrev=12"], capture_output=True, text=True).stdout.strip()
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results"]
    dirty = described and subprocess.run(changed, capture_output=True, text=True).stdout
    return f"{described}-dirty" if dirty else described or None


def machine() -> dict[str, Any]:
    """Processor, cores and memory, as far as this process may use them; bytes."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "isa": _C.build_info()["isa"],
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available_memory_bytes": _C.available_memory(),
        "system": f"{platform.system()} {platform.release()}",
    }


def information() -> dict[str, Any]:
    """Everything ``flashmoe info`` tells. Asks the driver for its GPUs if this build can use any."""
    settings = Settings()
    return {
        "schema": 1,
        "versions": versions(),
        "build": dict(_C.build_info()),
        "machine": machine(),
        "devices": ["cpu", *_gpus()],
        "found": {
            "cuda_in_torch": torch.version.cuda,
            "nvidia_driver": Path("/proc/driver/nvidia/version").exists(),
            "nvcc": shutil.which("nvcc"),
            "nvshmem": _nvshmem(),
            "ucx": _ucx(),
        },
        "arena_defaults": {
            "max_tokens": settings.max_tokens,
            "max_wire_bytes": settings.max_wire_bytes,
            "max_top_k": settings.max_top_k,
            "max_experts": settings.max_experts,
            "max_groups": settings.max_groups,
            "timeout_s": settings.timeout_s,
            "entry_timeout_s": settings.entry_timeout_s,
            "bytes_per_rank": {str(size): settings.arena_bytes(size) for size in (2, 8)},
        },
    }  # fmt: skip


def information_text(information: dict[str, Any]) -> str:
    """The same to read."""
    found, build, host = information["found"], information["build"], information["machine"]
    defaults = information["arena_defaults"]
    needs = defaults["bytes_per_rank"].items()
    arena = ", ".join(f"{count / 2**20:.0f} MiB a rank for {ranks} ranks" for ranks, count in needs)
    lines = [(name, value or "not installed") for name, value in information["versions"].items() if name != "commit"]
    lines += [
        ("commit", information["versions"]["commit"] or "not a checkout"),
        ("compiler", build["compiler"]),
        ("features", ", ".join(f"{name} {'yes' if on else 'no'}" for name, on in build["features"].items())),
        ("processor", f"{host['processor']} ({host['architecture']}), kernels for {host['isa']}"),
        ("cores", f"{host['usable_cores']} usable of {host['cores']}"),
        ("memory", f"{host['available_memory_bytes'] / 2**30:.1f} GiB left of {host['memory_bytes'] / 2**30:.1f}"),
        ("devices", ", ".join(information["devices"])),
        ("GPU code", f"for {build['cuda_architectures']}, by nvcc {build['cuda_compiler']}"
                     if build["features"]["cuda"] else "none in this build"),
        ("CUDA", f"torch {found['cuda_in_torch'] or 'without'}, driver {'yes' if found['nvidia_driver'] else 'no'}, "
                 f"nvcc {found['nvcc'] or 'no'}"),
        ("NVSHMEM", _nvshmem_text(found["nvshmem"])),
        ("UCX", found["ucx"]),
        ("arena", f"by default {defaults['max_tokens']} tokens of {defaults['max_wire_bytes']} bytes, "
                  f"k {defaults['max_top_k']}, {defaults['max_groups']} groups: {arena}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<14}{value}" for name, value in lines)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ucx() -> str:
    """Its version, or why ranks on several hosts cannot use it."""
    try:
        return ucx_version()
    except RuntimeError as error:
        return str(error)


def _nvshmem() -> dict[str, str | None]:
    """version, path and found of the library as it would be used, and the headers of this build; or why not."""
    headers = getattr(_C, "nvshmem_headers", None)
    try:
        return {**nvshmem.library(), "headers": headers, "missing": None}
    except RuntimeError as error:
        return {"version": None, "path": None, "found": None, "headers": headers, "missing": str(error)}


def _nvshmem_text(known: dict[str, str | None]) -> str:
    use = f"this build has headers of {known['headers']}" if known["headers"] else "this build cannot use it"
    return known["missing"] or f"{known['version']} ({known['found']}: {known['path']}); {use}"


def _gpus() -> list[str]:
    count = _C.num_cuda_devices() if hasattr(_C, "num_cuda_devices") else 0
    named = count > 0 and torch.cuda.is_available()  # torch may be built without CUDA
    return [f"cuda:{index} ({torch.cuda.get_device_name(index)})" if named else f"cuda:{index}" for index in range(count)]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
