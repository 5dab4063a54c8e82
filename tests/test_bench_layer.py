"""flashmoe bench layer: every combination is measured, checked and recorded, by itself and under torchrun."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashmoe import bench_cli, bench_layer, cuda_teams, measure, run
from flashmoe.cli import main
from flashmoe.records import read_records
from flashmoe.routing import Routing
from flashmoe.skew import SKEWS, skewed, with_capacity

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--iters", "2", "--seconds", "1", "--input", "random"]


def drawn(num_tokens: int, top_k: int, experts: int, seed: int = 3) -> Routing:
    scores = torch.rand(num_tokens, experts, generator=torch.Generator().manual_seed(seed))
    weights, ids = scores.topk(top_k)
    return Routing(ids, weights, experts)


@pytest.mark.parametrize("skew", SKEWS[1:])
def test_skewed_routing_keeps_weights_and_gives_no_token_an_expert_twice(skew):
    before = drawn(200, 4, 16)
    after = skewed(before, skew, seed=5)
    assert torch.equal(after.topk_weights, before.topk_weights)
    assert after.topk_ids.shape == (200, 4) and 0 <= int(after.topk_ids.min()) and int(after.topk_ids.max()) < 16
    assert all(len(set(row)) == 4 for row in after.topk_ids.tolist())
    assert torch.equal(after.topk_ids, skewed(before, skew, seed=5).topk_ids)
    assert not torch.equal(after.topk_ids, skewed(before, skew, seed=6).topk_ids)


def test_skews_are_as_uneven_as_they_say():
    before = drawn(800, 2, 16)
    assert set(skewed(before, "uniform", 0).tokens_per_expert().tolist()) == {100}
    zipf = skewed(before, "zipf", 0).tokens_per_expert()
    assert int(zipf[0]) > 2 * int(zipf[3]) > 2 * int(zipf[15]) > 0
    hot = skewed(before, "hot", 0).tokens_per_expert()
    assert 0.5 * 800 < int(hot[0]) < 0.65 * 800 and int(hot[1:].max()) < 0.2 * 800
    with pytest.raises(ValueError, match="skew must be one of router, uniform, zipf, hot, got 'cold'"):
        skewed(before, "cold", 0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity_drops_the_later_tokens_of_full_experts(factor):
    before = drawn(90, 3, 8)
    capacity, seen, wanted = -int(-factor * 90 * 3 // 8), [0] * 8, []
    for row in before.topk_ids.tolist():
        wanted.append([])
        for expert in row:
            wanted[-1].append(expert if seen[expert] < capacity else 8)
            seen[expert] += 1
    assert with_capacity(before, factor).topk_ids.tolist() == wanted


def test_every_combination_is_checked_and_recorded(capsys, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for name in ("_READ_BYTES", "_COPY_BYTES"):
        monkeypatch.setattr(measure, name, 16 << 20)
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)
    code = main([
        "bench", "layer", *QUICK, "--models", "mixtral-8x7b", "--scale", "64", "--tokens", "3", "40", "--ranks", "1",
        "--dtypes", "fp32", "bf16", "--skews", "router", "hot", "--out", str(tmp_path),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and output.rstrip().endswith("OK 8 configurations"), output
    records = read_records(tmp_path)
    assert len(records) == 8 and len({record.name for record in records}) == 8
    for record in records:
        rivals = {one["name"]: one.get("relative_error", 0.0) for one in record.data["baselines"]}
        assert set(rivals) == {"hf-eager", "hf-grouped_mm", "hf-batched_mm", "chain", "ceiling"}
        # Another's experts on the same tokens, to the reference as near as ours.
        assert max(rivals.values()) < (1e-5 if record.dtype == "fp32" else 0.05)
        assert record.data["run"]["inputs"] == 2 and record.data["clock"] == "host"
    hot = next(record for record in records if record.name == "mixtral-8x7b-64.w1.t40.fp32.hot")
    assert hot.data["routing"]["busiest_expert"] > 1.7 and "latency_with_router" not in hot.data
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page")]) == 0


def test_torchrun_with_the_papers_capacity(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "bench" / "bench_layer.py"), *QUICK, "--paper", "--scale", "64", "--tokens", "20", "50",
        "--dtypes", "fp32", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK 2 configurations" in done.stdout
    records = {record.tokens: record for record in read_records(tmp_path)}
    assert set(records) == {20, 50}
    for tokens, record in records.items():
        run, shape = record.data["run"], record.data["shape"]
        assert (run["ranks"], run["skew"], run["capacity_factor"], shape["gated"]) == (2, "uniform", 1.0, False)
        assert record.data["flops"] == 4 * 2 * tokens * 2 * (2048 // 64) ** 2  # uniform: nothing exceeds its share
        assert record.data["link"]["bytes"] > 0
        assert {one["name"] for one in record.data["baselines"]} == {
            "pipeline-grouped_mm", "pipeline-loop", "one-process", "ceiling"
        }  # fmt: skip
        assert all(one.get("relative_error", 0.0) < 1e-5 for one in record.data["baselines"])


def test_dropped_entries_are_dropped_by_the_pipeline_too(tmp_path):
    command = [
        sys.executable, "-m", "flashmoe", "bench", "layer", *QUICK, "--models", "flashmoe-paper", "--scale", "64",
        "--tokens", "50", "--ranks", "2", "--dtypes", "fp32", "--skews", "hot", "--capacity-factor", "1",
        "--baselines", "pipeline-loop", "--out", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = read_records(tmp_path)
    assert record.data["routing"]["rows"] < 0.9 * 2 * 50 * 2
    (pipeline,) = record.data["baselines"]
    assert pipeline["relative_error"] < 1e-5


def test_launchers_world_is_not_overruled(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        main(["bench", "layer", "--ranks", "2"])
    assert "argument --ranks: the launcher has started 4 ranks, got [2]" in capsys.readouterr().err


def test_failing_configuration_costs_only_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)
    monkeypatch.setattr(run, "available_memory", lambda: 3 << 30)
    code = main([
        "bench", "layer", *QUICK, "--models", "deepseek-v3", "flashmoe-paper", "--scale", "4", "--tokens", "8",
        "--ranks", "1", "--dtypes", "fp32", "--baselines", "none", "--out", str(tmp_path),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 1 and "FAILED deepseek-v3-4.w1.t8.fp32: NotEnoughMemory: not enough memory" in output
    assert json.loads((tmp_path / "flashmoe-paper-4.w1.t8.fp32.json").read_text())["ok"]
    assert not json.loads((tmp_path / "deepseek-v3-4.w1.t8.fp32.json").read_text())["ok"]


def test_configurations_come_in_the_order_of_the_lists_all_models_first(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_cli, "bench", lambda wanted, *_: seen.extend(wanted) or 0)
    main(["bench", "layer", "--models", "qwen3-30b-a3b", "mixtral-8x7b", "--tokens", "64", "1", "--ranks", "1",
          "--dtypes", "bf16", "--experts", "16"])  # fmt: skip
    order = [(one.tokens, one.shape.name) for one in seen]
    assert order == [(tokens, f"{name}-e16") for tokens in (64, 1) for name in ("qwen3-30b-a3b", "mixtral-8x7b")]
    assert {one.shape.num_experts for one in seen} == {16}
    assert seen[0].baselines == ("hf-eager", "hf-grouped_mm", "hf-batched_mm", "chain", "ceiling")


def test_no_configuration_begins_after_the_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)
    code = main([
        "bench", "layer", *QUICK, "--models", "flashmoe-paper", "--scale", "64", "--tokens", "8", "16", "--ranks", "1",
        "--dtypes", "fp32", "--baselines", "none", "--seconds-total", "0.1", "--experts", "128", "--out", str(tmp_path),
    ])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and output.rstrip().endswith("OK 1 configurations"), output
    assert "after 0.1 s not begun: flashmoe-paper-e128-64.w1.t16.fp32" in output
    (record,) = read_records(tmp_path)
    assert record.data["shape"]["num_experts"] == 128 and record.tokens == 8


@pytest.mark.parametrize(("arguments", "message"), [
    (["--device", "cuda"], "argument --device: no GPU is here"),
    (["--graph"], "argument --graph: needs --device cuda and --ranks 1, got cpu and [1, 2]"),
    (["--graph", "--device", "cuda", "--ranks", "2"], "needs --device cuda and --ranks 1, got cuda and [2]"),
    (["--dtypes", "tf32"], "argument --dtypes: tf32 needs --device cuda"),
    (["--experts", "1"], "argument --experts: experts must be at least 8, a token's of qwen3-30b-a3b, got 1"),
])  # fmt: skip
def test_what_cannot_be_measured_here_is_told_before_anything_is(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(cuda_teams, "missing", lambda: "no GPU is here")
    with pytest.raises(SystemExit) as exit:
        main(["bench", "layer", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_on_gpus_the_papers_comparison_is_in_tf32_and_bf16(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda_teams, "missing", lambda: None)
    monkeypatch.setattr(bench_cli, "bench", lambda wanted, *_: seen.extend(wanted) or 0)
    main(["bench", "layer", "--paper", "--device", "cuda", "--tokens", "8192", "--graph"])
    assert [(one.dtype, one.ranks, one.torch_dtype) for one in seen] == [
        ("tf32", 1, torch.float32), ("bf16", 1, torch.bfloat16)
    ]  # fmt: skip
    assert all(one.graph and one.capacity_factor == 1.0 and "virtual-8" in one.baselines for one in seen)
    assert bench_layer.name_of(seen[0]) == "flashmoe-paper.w1.t8192.tf32.uniform.capacity1.graph"
