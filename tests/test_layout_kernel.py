"""Who may include whom among the files of the GPU's kernel: rules as in test_layout.py, and lines that break them."""

import pytest
from test_layout import core, includes, read_sources

# What makes a block of a GPU a worker; the rest of gpu/ is verbs and groups of threads, which know no call.
GPU_WORKER = {"csrc/gpu/worker.h", "csrc/gpu/work_ring.h", "csrc/gpu/rank_state.h"}


def agents_belong_to_workers(sources):
    """Only the two kinds of workers include the agent, and only the runtime includes the GPU's worker."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if name == "protocol/agent.h" and path not in {"csrc/protocol/moe_kernel.h"} | GPU_WORKER:
                yield f"{path} includes {name}"
            if name == "gpu/worker.h" and not path.startswith("csrc/runtime/"):
                yield f"{path} includes {name}"


def verbs_know_no_call(sources):
    """Of the protocol the GPU's verbs know config.h, and its groups of threads group.h; neither knows who uses them."""
    known = {"protocol/config.h", "protocol/group.h"}
    for path, text in core(sources).items():
        if not path.startswith("csrc/gpu/") or path in GPU_WORKER:
            continue
        for name, _ in includes(text):
            other_gpu = name.startswith("gpu/") and "csrc/" + name not in GPU_WORKER
            if name.startswith(("protocol/", "engine/", "platform/", "runtime/", "gpu/")) and name not in known and not other_gpu:
                yield f"{path} includes {name}"


# As in test_layout.py: files that break the rule, one by one; then files that keep it.
PLANTED = {
    agents_belong_to_workers: (
        [
            {"csrc/runtime/moe_cuda.cu": '#include "protocol/agent.h"'},
            {"csrc/engine/exact.h": '#include "gpu/worker.h"'},
        ],
        {"csrc/gpu/worker.h": '#include "protocol/agent.h"', "csrc/runtime/moe_cuda.cu": '#include "gpu/worker.h"'},
    ),
    verbs_know_no_call: (
        [
            {"csrc/gpu/verbs.h": '#include "protocol/task.h"'},
            {"csrc/gpu/thread_groups.h": '#include "gpu/worker.h"'},
            {"csrc/gpu/simt.h": '#include "platform/cuda.h"'},
        ],
        {"csrc/gpu/verbs.h": '#include "protocol/config.h"\n#include "gpu/ptx.cuh"',
         "csrc/gpu/worker.h": '#include "gpu/work_ring.h"\n#include "protocol/agent.h"'},
    ),
}
rules = pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)


@rules
def test_sources_keep_the_rule(rule):
    complaints = list(rule(read_sources()))
    assert not complaints, f"{rule.__doc__}\n" + "\n".join(complaints)


@rules
def test_rule_sees_each_planted_violation(rule):
    violations, _ = PLANTED[rule]
    for files in violations:
        assert list(rule(files)), f"{rule.__name__} passes {files}"


@rules
def test_rule_passes_what_keeps_it(rule):
    _, lawful = PLANTED[rule]
    assert not list(rule(lawful))


def test_the_kernel_is_seen():
    assert "csrc/gpu/worker.h" in core(read_sources())
