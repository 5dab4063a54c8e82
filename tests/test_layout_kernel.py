"""Who may include whom among the files of the GPU's kernel: rules as in test_layout.py, and lines that break them."""

import pytest
from test_layout import core, includes, read_sources


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


# As in test_layout.py: files that break the rule, one by one; then files that keep it.
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
    assert "csrc/kernel/worker.h" in core(read_sources())
