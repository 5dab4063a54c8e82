"""Who may include the GPU's verbs, and what they may include: the rule of csrc/gpu, in the manner of test_layout."""

from pathlib import PurePosixPath

import pytest
from test_layout import STD, core, includes, read_sources

DOORS = {"gpu/verbs.h", "gpu/tensor_map.h"}


def complaints(sources):
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


def test_sources_keep_the_rule():
    sources = read_sources()
    assert "csrc/gpu/verbs.h" in sources
    assert not list(complaints(sources)), complaints.__doc__


@pytest.mark.parametrize("files", [
    {"csrc/gpu/verbs.h": '#include "protocol/task.h"', "csrc/protocol/task.h": ""},
    {"csrc/gpu/ptx.cuh": '#include "engine/cpu.h"', "csrc/engine/cpu.h": ""},
    {"csrc/gpu/ptx_copy.cuh": '#include "gpu/simt_copy.h"', "csrc/gpu/simt_copy.h": ""},
    {"csrc/gpu/simt.h": '#include "gpu/ptx_copy.cuh"', "csrc/gpu/ptx_copy.cuh": ""},
    {"csrc/gpu/verbs.h": '#include "gpu/gone.h"'},
    {"csrc/engine/sm90.cuh": '#include "gpu/ptx_wgmma.cuh"'},
])
def test_rule_sees_each_planted_violation(files):
    assert list(complaints(files))


def test_rule_passes_what_keeps_it():
    assert not list(complaints({
        "csrc/gpu/verbs.h": '#include <cuda.h>\n#include "gpu/simt_verbs.h"\n#include "gpu/ptx.cuh"\n' + STD,
        "csrc/gpu/simt_verbs.h": '#include "gpu/verbs.h"',
        "csrc/gpu/ptx.cuh": '#include "gpu/ptx_mma.cuh"',
        "csrc/gpu/ptx_mma.cuh": "",
        "csrc/engine/sm90.cuh": '#include "gpu/verbs.h"',
    }))
