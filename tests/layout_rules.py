"""Who may include whom, and what may stand where: the rules that no compiler checks.

Each rule is a function from {path: text} to a list of complaints; PLANTED holds, for each, files that break it, one by
one, and then files that keep it although they look similar.
"""

import re
from pathlib import PurePosixPath

from layout_sources import code_only, core, includes

ROLES = ("dispatcher", "subscriber", "scheduler", "processor")
# Lower levels never include higher ones. Protocol headers that are not named here stand between 1 and 3.
PROTOCOL_LEVELS = {"config": 0, "group": 0, "platform": 0, "packet": 1, "task": 1, "signal": 1, "heap_layout": 1, "work": 1}
PROTOCOL_LEVELS |= {"agent": 4, "crew": 4, "backward_crew": 4, "moe_kernel": 5}
PROTOCOL_LEVELS |= dict.fromkeys(ROLES, 3)
PLATFORMS = {"platform/host.h", "platform/cuda.h", "platform/nvshmem.h"}
ENGINES = {"engine/cpu.h", "engine/exact.h", "engine/sm80.h", "engine/sm90.h"}
# The contracts that the protocol is written against.
ENGINE_CONCEPTS = ("engine/tile_engine.h", "engine/backward_engine.h")
NVSHMEM_FILES = {
    "csrc/bindings.cpp", "csrc/gpu/nvshmem_verbs.cuh", "csrc/gpu/remote_verbs.h", "csrc/platform/nvshmem.h",
    "csrc/runtime/cuda_kernel.h", "csrc/runtime/cuda_kernel.cu", "csrc/runtime/cuda_ranks.h", "csrc/runtime/moe_cuda.h",
    *(f"csrc/runtime/moe_cuda_{engine}_nvshmem.cu" for engine in ("exact", "exact_backward", "sm80", "sm80_backward", "sm90")),
    "csrc/bindings_nvshmem.h", "csrc/bindings_nvshmem.cpp",
    *(f"csrc/runtime/nvshmem_{part}" for part in
      ("adaptor.cpp", "calls.h", "library.h", "library.cpp", "world.h", "world.cpp")),
}  # fmt: skip
SAYS_NOTHING = {"types", "utils", "util", "common", "misc", "helpers"}
MAX_LINES = 300


def role_of(name: str) -> str | None:
    """The role that protocol/`name` belongs to: processor.h, or a part of it such as processor_down.h."""
    path = PurePosixPath(name)
    if path.parent.name != "protocol":
        return None
    return next((role for role in ROLES if path.stem == role or path.stem.startswith(role + "_")), None)


def level_of(name: str) -> int:
    return PROTOCOL_LEVELS.get(role_of(name) or PurePosixPath(name).stem, 2)


def protocol_stands_alone(sources):
    """The protocol includes its siblings, the engines' concepts and the standard library."""
    standard_c = {"stddef.h", "stdint.h", "string.h"}
    for path, text in core(sources).items():
        if not path.startswith("csrc/protocol/"):
            continue
        for name, angle in includes(text):
            standard = angle and (re.fullmatch(r"[a-z_]+", name) or name in standard_c)
            if not (standard or name in ENGINE_CONCEPTS or "csrc/" + name in sources and name.startswith("protocol/")):
                yield f"{path} includes {name}"


def protocol_has_levels(sources):
    """{config, group, platform} ← {packet, task, signal, heap_layout, work} ← the rest ← roles ← {agent, crew} ←
    moe_kernel; no role in a role."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if not path.startswith("csrc/protocol/") or not name.startswith("protocol/"):
                continue
            if level_of(name) > level_of(path) or (role_of(name) and role_of(path) and role_of(name) != role_of(path)):
                yield f"{path} includes {name}"


def roles_belong_to_the_kernel(sources):
    """Only moe_kernel.h includes roles, only the runtime includes moe_kernel.h."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if role_of(name) and not path.startswith("csrc/protocol/"):
                yield f"{path} includes {name}"
            if name == "protocol/moe_kernel.h" and not path.startswith("csrc/runtime/"):
                yield f"{path} includes {name}"


def platforms_and_engines_apart(sources):
    """Only runtime/moe_* names a platform beside an engine; neither includes the other, or what uses them."""
    for path, text in core(sources).items():
        names = {name for name, _ in includes(text)}
        if names & PLATFORMS and names & ENGINES and not path.startswith("csrc/runtime/moe_"):
            yield f"{path} includes {sorted(names & (PLATFORMS | ENGINES))}"
        for below, foreign in (("platform", ("engine/", "runtime/")), ("engine", ("platform/", "runtime/"))):
            if path.startswith(f"csrc/{below}/"):
                yield from (f"{path} includes {name}" for name in sorted(names) if name.startswith(foreign))


def python_and_torch_stay_outside(sources):
    """No torch anywhere in csrc, pybind11 and Python.h in the bindings alone."""
    for path, text in core(sources).items():
        for name, _ in includes(text):
            if name.startswith(("torch/", "ATen/", "c10/")):
                yield f"{path} includes {name}"
            if name.startswith(("pybind11/", "Python.h")) and not re.fullmatch(r"csrc/bindings\w*\.(cpp|h)", path):
                yield f"{path} includes {name}"


def threads_in_their_rooms(sources):
    """Threads, locks and yields in csrc/platform and csrc/runtime."""
    used = re.compile(
        r"\bstd::(?:jthread|thread|this_thread|async|barrier|latch|\w*mutex|condition_variable\w*|\w+_semaphore)\b"
        r"|\bpthread_\w+|\bsched_yield\b|\bthrd_\w+"
        r"|#\s*include\s*<(?:thread|mutex|shared_mutex|condition_variable|future|barrier|latch|semaphore|pthread\.h)>"
    )
    for path, text in core(sources).items():
        if not path.startswith(("csrc/platform/", "csrc/runtime/")):
            yield from (f"{path} uses {m[0]}" for m in used.finditer(code_only(text)))


def order_sits_on_atomics(sources):
    """No free fences: ThreadSanitizer, which checks the protocol's order, does not understand them."""
    fence = re.compile(r"\batomic_(?:thread|signal)_fence\b|\b__sync_synchronize\b|\b_mm_[ms]?l?fence\b")
    for path, text in core(sources).items():
        yield from (f"{path} uses {m[0]}" for m in fence.finditer(code_only(text)))


def nvshmem_in_its_room(sources):
    for path, text in core(sources).items():
        named = "nvshmem" in code_only(text).lower() or any("nvshmem" in name for name, _ in includes(text))
        if named and path not in NVSHMEM_FILES:
            yield f"{path} names NVSHMEM"


def ucx_in_its_room(sources):
    """Headers of UCX, which need not be there, in files that are left out then."""
    for path, text in core(sources).items():
        if not re.fullmatch(r"csrc/platform/ucx_\w+\.(h|cpp)|csrc/bindings_ucx\.cpp", path):
            names = (name for name, _ in includes(text))
            yield from (f"{path} includes {name}" for name in names if re.match(r"uc[pst]/|platform/ucx_", name))


def nothing_ends_the_process(sources):
    """A user's mistake is an exception; a library never ends the process it lives in."""
    ends = re.compile(r"(?<![\w.>])(?:exit|_exit|_Exit|quick_exit|abort|terminate|assert|__builtin_trap)\s*\(")
    for path, text in core(sources).items():
        yield from (f"{path} calls {m[0]}" for m in ends.finditer(code_only(text)))


def names_say_what_may_go_in(sources):
    yield from (path for path in sources if PurePosixPath(path).stem in SAYS_NOTHING)


def one_idea_a_file(sources):
    for path, text in sources.items():
        if text.count("\n") >= MAX_LINES:
            yield f"{path} has {text.count(chr(10))} lines, {MAX_LINES - 1} are the most"


STD = '#include <vector>\n#include "protocol/config.h"\n'
PLANTED = {
    protocol_stands_alone: (
        [
            {"csrc/protocol/task.h": "#include <unistd.h>"},
            {"csrc/protocol/task.h": "#include <cuda/atomic>"},
            {"csrc/protocol/task.h": '#include "engine/cpu.h"', "csrc/engine/cpu.h": ""},
            {"csrc/protocol/task.h": '#include "protocol/gone.h"'},
        ],
        {"csrc/protocol/task.h": STD + f'#include "{ENGINE_CONCEPTS[1]}"', "csrc/protocol/config.h": "// <unistd.h>"},
    ),
    protocol_has_levels: (
        [
            {"csrc/protocol/config.h": '#include "protocol/task.h"'},
            {"csrc/protocol/plan.h": '#include "protocol/dispatcher.h"'},
            {"csrc/protocol/scheduler.h": '#include "protocol/processor.h"'},
            {"csrc/protocol/scheduler_steps.h": '#include "protocol/processor_down.h"'},
            {"csrc/protocol/processor.h": '  #  include "protocol/moe_kernel.h"'},
        ],
        {"csrc/protocol/moe_kernel.h": "".join(f'#include "protocol/{role}.h"\n' for role in ROLES),
         "csrc/protocol/processor.h": '#include "protocol/processor_down.h"\n#include "protocol/plan.h"'},
    ),
    roles_belong_to_the_kernel: (
        [
            {"csrc/platform/host.h": '#include "protocol/subscriber.h"'},
            {"csrc/engine/cpu.h": '#include "protocol/processor_down.h"'},
            {"csrc/runtime/moe_host.cpp": '#include "protocol/dispatcher.h"'},
            {"csrc/bindings.cpp": '#include "protocol/moe_kernel.h"'},
        ],
        {"csrc/runtime/moe_host.cpp": '#include "protocol/moe_kernel.h"', "csrc/engine/cpu.h": STD},
    ),
    platforms_and_engines_apart: (
        [
            {"csrc/bindings.cpp": '#include "engine/cpu.h"\n#include "platform/host.h"'},
            {"csrc/engine/cpu.h": '#include "platform/host.h"'},
            {"csrc/platform/host.h": '#include "engine/cpu.h"'},
            {"csrc/platform/host.h": '#include "runtime/moe.h"'},
        ],
        {"csrc/runtime/moe_host.cpp": '#include "engine/cpu.h"\n#include "platform/host.h"'},
    ),
    python_and_torch_stay_outside: (
        [
            {"csrc/bindings.cpp": "#include <torch/extension.h>"},
            {"csrc/runtime/moe.h": "#include <pybind11/pybind11.h>"},
            {"csrc/engine/cpu.h": "#include <Python.h>"},
        ],
        {"csrc/bindings.cpp": "#include <pybind11/stl.h>", "csrc/runtime/moe.h": "// no torch/extension.h"},
    ),
    threads_in_their_rooms: (
        [
            {"csrc/protocol/scheduler.h": "#include <thread>"},
            {"csrc/engine/cpu.cpp": "std::mutex lock;"},
            {"csrc/bindings.cpp": "std::this_thread::yield();"},
            {"csrc/engine/cpu.cpp": "pthread_create(&t, 0, f, 0);"},
        ],
        {"csrc/platform/host.h": "#include <thread>", "csrc/engine/cpu.h": "/* no std::thread */ int num_threads;"},
    ),
    order_sits_on_atomics: (
        [
            {"csrc/platform/host.h": "std::atomic_thread_fence(std::memory_order_seq_cst);"},
            {"csrc/protocol/signal.h": "_mm_mfence();"},
            {"csrc/engine/cpu.h": "_mm_sfence();"},
        ],
        {"csrc/platform/host.h": "// no atomic_thread_fence\na.store(1, std::memory_order_release);"},
    ),
    nvshmem_in_its_room: (
        [
            {"csrc/platform/cuda.h": "nvshmem_ptr(p, pe);"},
            {"csrc/runtime/moe.h": "#include <nvshmem.h>"},
            {"csrc/runtime/moe_host.cpp": '#include "platform/nvshmem.h"'},
        ],
        {"csrc/gpu/nvshmem_verbs.cuh": "#include <nvshmem.h>", "csrc/bindings.cpp": 'd["nvshmem"] = false;  // NVSHMEM'},
    ),
    ucx_in_its_room: (
        [
            {"csrc/platform/host.h": "#include <ucp/api/ucp.h>"},
            {"csrc/runtime/moe_host.cpp": '#include "platform/ucx_network.h"'},
            {"csrc/bindings.cpp": '#include "platform/ucx_fabric.h"'},
        ],
        {"csrc/platform/ucx_library.h": "#include <ucp/api/ucp.h>", "csrc/bindings.cpp": '#include "bindings_ucx.h"'},
    ),
    nothing_ends_the_process: (
        [
            {"csrc/runtime/moe.h": "std::exit(1);"},
            {"csrc/runtime/moe.h": "if (bad) abort ();"},
            {"csrc/engine/cpu.h": "assert(n > 0);"},
            {"csrc/platform/host.h": "::_exit(2);"},
        ],
        {"csrc/runtime/moe.h": 'static_assert(sizeof(int) == 4); group.on_abort(1); s = "exit(1)";  // exit(1)'},
    ),
    names_say_what_may_go_in: (
        [{"csrc/protocol/types.h": ""}, {"flashmoe/utils.py": ""}, {"tests/cpp/common.h": ""}],
        {"csrc/protocol/config.h": "", "flashmoe/activations.py": ""},
    ),
    one_idea_a_file: (
        [{"flashmoe/module.py": "\n" * MAX_LINES}, {"csrc/bindings.cpp": "\n" * 1000}],
        {"flashmoe/module.py": "\n" * (MAX_LINES - 1)},
    ),
}
