"""The Triton baseline in Triton's interpreter, which needs a process that was started for it, and no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from baseline_case import drawn_problem
from triton_interpreter import CASES

from flashmoe import baselines
from flashmoe.baselines.padded_blocks import padded_blocks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(tests / "triton_interpreter.py")], capture_output=True, text=True, timeout=200,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_result_is_the_references(name, errors):
    assert errors[name] < (2e-3 if name == "float16" else 1e-6)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "height", "multiple"), [(9, 2, 5, 4, 1), (1, 1, 8, 16, 2), (64, 3, 4, 8, 3)]
)
def test_blocks_hold_every_pair_once_beside_pairs_of_its_expert(tokens, top_k, experts, height, multiple):
    ids = torch.rand(tokens, experts).topk(top_k).indices
    pair, expert = padded_blocks(ids, experts, height, multiple)
    blocks, pairs = pair.view(-1, height), tokens * top_k
    assert len(blocks) == len(expert) and len(blocks) % multiple == 0
    assert sorted(pair[pair < pairs].tolist()) == list(range(pairs))
    for block, owner in zip(blocks.tolist(), expert.tolist(), strict=True):
        held = [one for one in block if one < pairs]
        assert {int(ids.flatten()[one]) for one in held} == ({owner} if owner >= 0 else set())
        assert block == held + [pairs] * (height - len(held))  # the padding comes last


def test_without_a_gpu_it_is_skipped(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(baselines.Skipped, match="needs a GPU"):
        baselines.baseline("triton").make(drawn_problem(3, 1, 2, 16, 16))
