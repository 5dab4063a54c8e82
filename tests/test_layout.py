"""The rules of layout, over the sources, and over planted lines that break them."""

import re

import layout_rules
import layout_rules_gpu
import pytest
from layout_sources import ROOT, core, includes, read_sources

PLANTED = layout_rules.PLANTED | layout_rules_gpu.PLANTED
rules = pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)


@rules
def test_sources_keep_the_rule(rule):
    complaints = list(rule(read_sources()))
    assert not complaints, f"{rule.__doc__ or rule.__name__}\n" + "\n".join(complaints)


@rules
def test_rule_sees_each_planted_violation(rule):
    violations, _ = PLANTED[rule]
    for files in violations:
        assert list(rule(files)), f"{rule.__name__} passes {files}"


@rules
def test_rule_passes_what_keeps_it(rule):
    _, lawful = PLANTED[rule]
    assert not list(rule(lawful))


def test_the_sources_are_seen():
    sources = read_sources()
    for path in ("csrc/protocol/moe_kernel.h", "csrc/kernel/worker.h", "csrc/gpu/verbs.h", "flashmoe/_version.py"):
        assert path in sources
    assert any(layout_rules.role_of(name) for text in core(sources).values() for name, _ in includes(text))


def test_no_build_file_relaxes_floating_point():
    for path in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake"), ROOT / "setup.py"]:
        assert not re.search(r"-(?:ffast-math|Ofast|funsafe-math\w*|march=native)", path.read_text()), path
