"""Who may include whom among the files of the GPU's kernel: rules as in layout_rules.py."""

from pathlib import PurePosixPath

from layout_rules import STD
from layout_sources import core, includes

DOORS = {"gpu/verbs.h", "gpu/remote_verbs.h", "gpu/tensor_map.h"}


def agents_belong_to_workers(sources):
    """Only the two kinds of workers include the agent; only the runtime includes the GPU's worker."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if name == "protocol/agent.h" and path != "csrc/protocol/moe_kernel.h" and not path.startswith("csrc/kernel/"):
                yield f"{path} includes {name}"
            if name.startswith("kernel/") and not path.startswith(("csrc/kernel/", "csrc/runtime/moe_", "csrc/runtime/cuda_")):
                yield f"{path} includes {name}"


def workers_name_no_machine(sources):
    """A worker takes its platform and its engine as parameters."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if path.startswith("csrc/kernel/") and name.startswith(("platform/", "engine/", "runtime/")):
                yield f"{path} includes {name}"


def verbs_have_doors(sources):
    """csrc/gpu includes its siblings and protocol/config.h; nvcc's half and the fibers' half never include each other.

    Whoever speaks the verbs includes one of DOORS, not what they are made of.
    """
    for path, text in core(sources).items():
        for name, angle in includes(text):
            if path.startswith("csrc/gpu/") and not angle:
                known = name == "protocol/config.h" or "csrc/" + name in sources and name.startswith("gpu/")
                halves = {PurePosixPath(p).name.split("_")[0].split(".")[0] for p in (path, name)}
                if not known or halves == {"ptx", "simt"}:
                    yield f"{path} includes {name}"
            elif name.startswith("gpu/") and not path.startswith("csrc/gpu/") and name not in DOORS:
                yield f"{path} includes {name}"


PLANTED = {
    agents_belong_to_workers: (
        [
            {"csrc/runtime/moe_cuda.cu": '#include "protocol/agent.h"'},
            {"csrc/engine/exact.h": '#include "kernel/worker.h"'},
        ],
        {"csrc/kernel/worker.h": '#include "protocol/agent.h"', "csrc/runtime/moe_cuda.cu": '#include "kernel/worker.h"'},
    ),
    workers_name_no_machine: (
        [{"csrc/kernel/worker.h": '#include "platform/cuda.h"'}, {"csrc/kernel/worker.h": '#include "engine/exact.h"'}],
        {"csrc/kernel/worker.h": '#include "gpu/verbs.h"', "csrc/runtime/moe_cuda.cu": '#include "engine/exact.h"'},
    ),
    verbs_have_doors: (
        [
            {"csrc/gpu/verbs.h": '#include "protocol/task.h"', "csrc/protocol/task.h": ""},
            {"csrc/gpu/ptx.cuh": '#include "engine/cpu.h"', "csrc/engine/cpu.h": ""},
            {"csrc/gpu/ptx_copy.cuh": '#include "gpu/simt_copy.h"', "csrc/gpu/simt_copy.h": ""},
            {"csrc/gpu/simt.h": '#include "gpu/ptx_copy.cuh"', "csrc/gpu/ptx_copy.cuh": ""},
            {"csrc/gpu/verbs.h": '#include "gpu/gone.h"'},
            {"csrc/engine/sm90.cuh": '#include "gpu/ptx_wgmma.cuh"'},
        ],
        {
            "csrc/gpu/verbs.h": '#include <cuda.h>\n#include "gpu/simt_verbs.h"\n#include "gpu/ptx.cuh"\n' + STD,
            "csrc/gpu/simt_verbs.h": '#include "gpu/verbs.h"',
            "csrc/gpu/ptx.cuh": '#include "gpu/ptx_mma.cuh"',
            "csrc/gpu/ptx_mma.cuh": "",
            "csrc/engine/sm90.cuh": '#include "gpu/verbs.h"',
        },
    ),
}
