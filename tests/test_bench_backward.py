"""flashmoe bench layer --passes backward: who takes part is found by trying, also the layer itself."""

import json
import subprocess
import sys

import pytest
import torch

from flashmoe import bench_cli, bench_layer, measure, ops
from flashmoe.cli import main
from flashmoe.records import read_records

QUICK = ["--passes", "backward", "--iters", "2", "--seconds", "1", "--input", "random", "--dtypes", "fp32"]
SMALL = ["--models", "mixtral-8x7b", "--scale", "64"]
LEAVES = {"x", "topk_weights", "gate_up_proj", "down_proj"}
REASON = "no backward: it raised RuntimeError: not on this machine"


@pytest.fixture
def quick(monkeypatch):
    for name in ("_READ_BYTES", "_COPY_BYTES"):
        monkeypatch.setattr(measure, name, 16 << 20)
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)


def tampered(change):
    """The operator with ``change`` made to its gradients."""

    class Tampered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, grad):
            return change(grad)

    real = ops.fused_moe

    def fused_moe(x, *others, **how):
        return real(Tampered.apply(x) if torch.is_grad_enabled() else x, *others, **how)

    return fused_moe


def refuse(grad):
    raise RuntimeError("not on this machine")


def test_others_are_checked_and_timed_where_the_layer_has_no_backward(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(ops, "fused_moe", tampered(refuse))
    code = main(["bench", "layer", *QUICK, *SMALL, "--tokens", "3", "40", "--ranks", "1", "--baselines",
                 "chain,ceiling,triton", "--out", str(tmp_path)])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and "OK 2 configurations" in output and "no backward; chain " in output, output
    records = {record.tokens: record for record in read_records(tmp_path)}
    for tokens, record in records.items():
        data, size = record.data, 3 * 64 * 224 * 4
        assert record.name == f"mixtral-8x7b-64.w1.t{tokens}.fp32.backward" and "latency" not in data
        assert "torch.autograd.grad" in data["timed"] and data["run"]["passes"] == "backward"
        said = {one["name"]: one for one in data["baselines"]}
        assert said["flashmoe"]["skipped"].startswith(REASON)
        assert said["triton"]["skipped"] == "needs a GPU" and "gflops" in said["ceiling"]
        assert set(said["chain"]["gradient_errors"]) == LEAVES and "ratio" not in said["chain"]
        assert all(said["chain"]["gradient_errors"][leaf] <= 4 * data["gradient_check"]["bounds"][leaf] for leaf in LEAVES)
        once = 2 * tokens * 2 * size // 4
        assert data["flops_by_product"] == dict.fromkeys(("forward", "row_gradients", "weight_gradients"), once)
        assert data["flops"] == 3 * once and said["chain"]["gflops"] == pytest.approx(3 * once / said["chain"]["p50"] / 1e9)
        used = data["routing"]["experts_used"]
        moved = {name: data["bytes"][name] for name in ("weights", "weight_gradients", "x", "grad_x", "y", "grad_y")}
        assert moved == {"weights": 2 * used * size, "weight_gradients": used * size, "x": 2 * tokens * 256,
                         **dict.fromkeys(("grad_x", "y", "grad_y"), tokens * 256)}  # fmt: skip
        assert data["floor"]["weight_bytes_touched"] == 3 * used * size
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<td>no backward</td>") == 2 and "forward + backward" in page


def test_layer_is_checked_and_timed(capsys, tmp_path, quick):
    code = main(["bench", "layer", *QUICK, *SMALL, "--tokens", "20", "--ranks", "1", "--baselines", "chain,ceiling",
                 "--out", str(tmp_path)])  # fmt: skip
    output = capsys.readouterr().out
    assert code == 0 and "no backward" not in output, output
    (record,) = read_records(tmp_path)
    assert [one["name"] for one in record.data["baselines"]] == ["chain", "ceiling"]
    assert record.data["latency"]["gflops"] > 0 and record.rival()["ratio"] > 0 and record.data["floor"]["share_of_speed"] > 0
    gradients = record.data["error"]["gradients"]
    assert set(gradients) == LEAVES and all(one["relative"] <= one["bound"] for one in gradients.values())
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "<td>backward</td>" in page and "<td>no backward</td>" not in page


def test_layer_with_a_wrong_gradient_fails(capsys, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(ops, "fused_moe", tampered(lambda grad: grad * 1.001))
    code = main(["bench", "layer", *QUICK, *SMALL, "--tokens", "20", "--ranks", "1", "--baselines", "chain",
                 "--out", str(tmp_path)])  # fmt: skip
    assert code == 1 and "FAILED mixtral-8x7b-64.w1.t20.fp32.backward: relative error 1.00e-03 of x's gradient is above" in (
        capsys.readouterr().out
    )
    assert not json.loads((tmp_path / "mixtral-8x7b-64.w1.t20.fp32.backward.json").read_text())["ok"]


def test_several_ranks_agree_on_who_takes_part(tmp_path):
    command = [sys.executable, "-m", "flashmoe", "bench", "layer", *QUICK, *SMALL, "--tokens", "20", "--ranks", "2",
               "--out", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = read_records(tmp_path)
    said = {one["name"]: one for one in record.data["baselines"]}
    assert set(said) == {"pipeline-grouped_mm", "pipeline-loop", "one-process", "ceiling"}
    assert record.data["latency"]["gflops"] > 0
    for name in ("pipeline-grouped_mm", "pipeline-loop", "one-process"):
        assert max(said[name]["gradient_errors"].values()) < 1e-5 and said[name]["p50"] > 0
    counted = sum(map(sum, (kind for rank in record.data["bytes_per_peer"] for kind in rank.values())))
    assert record.data["bytes"]["sent"] == 2 * counted > 0 and record.data["link"]["bytes"] > 0


def test_forward_comes_first(monkeypatch):
    seen = []
    monkeypatch.setattr(bench_cli, "bench", lambda wanted, *_: seen.extend(wanted) or 0)
    main(["bench", "layer", "--passes", "forward", "backward", "--tokens", "8", "1", "--ranks", "1", "--dtypes", "bf16"])
    assert [(one.passes, one.tokens) for one in seen] == [(p, t) for p in ("forward", "backward") for t in (8, 1)]
    assert bench_layer.name_of(seen[3]) == bench_layer.name_of(seen[1]) + ".backward"
