"""flashmoe run on GPUs and under torchrun, without a GPU: what is asked for or refused, what virtual ranks bring."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cpu_team
import numpy as np
import pytest
import torch

from flashmoe import _C, cli, measure, run, run_trace
from flashmoe.records import read_records
from flashmoe.run_options import RunOptions
from flashmoe.timeline import EVENT, UP, RankTrace, Trace

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "mixtral-8x7b", "--scale", "64", "--tokens", "24", "--iters", "3", "--seconds", "1"]


@pytest.fixture
def gpu(monkeypatch):
    cpu_team.install(monkeypatch)


@pytest.fixture
def asked(monkeypatch) -> list[RunOptions]:
    """What runs were asked for, instead of running."""
    seen: list[RunOptions] = []
    monkeypatch.setattr(cli, "run", lambda options, *rest: seen.append(options) or 0)
    return seen


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(["run", *arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_without_a_gpu_it_is_told_what_is_missing(capsys, monkeypatch):
    monkeypatch.delattr(_C, "CudaTeam", raising=False)
    lack = "argument --device: this build of flashmoe has no CUDA half; `flashmoe info` tells"
    assert lack in refusal(capsys, "--device", "cuda") and lack in refusal(capsys, "--device", "cuda", "--virtual")
    cpu_team.install(monkeypatch, gpus=0)
    assert "argument --device: no GPU is here, or no driver for it" in refusal(capsys, "--device", "cuda")
    cpu_team.install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"a GPU is here, but torch {torch.__version__} cannot use it" in refusal(capsys, "--device", "cuda")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--virtual"], "argument --virtual: needs --device cuda, got cpu"),
    (["--device", "cuda", "--ranks", "2"], "each rank needs a GPU, 1 of 2 are here; with --virtual the ranks share it"),
    (["--dtype", "tf32"], "argument --dtype: tf32 needs --device cuda"),
    (["--device", "cuda", "--virtual", "--remote-only", "3"], "argument --remote-only: is of ranks on CPUs"),
    (["--device", "cuda", "--baselines", "pipeline-loop"], "argument --baselines: with --ranks 1 choose from hf-eager"),
    (["--device", "cuda", "--virtual", "--baselines", "virtual-2"], "argument --baselines: with --ranks 2 choose from"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(gpu, arguments, message, capsys):
    assert message in refusal(capsys, *arguments)


def test_a_launchers_world_is_what_runs(gpu, asked, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "usable_cores", lambda: 8)
    assert "the launcher has started 4 ranks, got 2" in refusal(capsys, "--ranks", "2")
    assert "is of one process, and the launcher has started 4" in refusal(capsys, "--device", "cuda", "--virtual")
    assert cli.main(["run"]) == cli.main(["run", "--ranks", "4", "--device", "cuda"]) == 0
    assert [(one.ranks, one.processes, one.threads) for one in asked] == [(4, 4, 4)] * 2
    assert [one.device for one in asked] == ["cpu", "cuda"]


def test_defaults_follow_the_device(gpu, asked):
    for arguments in ([], ["--device", "cuda"], ["--device", "cuda", "--virtual"]):
        cli.main(["run", *arguments])
    host, alone, virtual = asked
    assert [(one.ranks, one.processes, one.dtype) for one in asked] == [(2, 2, "fp32"), (1, 1, "bf16"), (2, 1, "bf16")]
    assert "triton" in alone.baselines and "virtual-8" in alone.baselines and "pipeline-loop" not in alone.baselines
    assert set(alone.baselines) - set(virtual.baselines) == {"virtual-2", "virtual-4", "virtual-8"}
    assert set(virtual.baselines) - set(alone.baselines) == {"one-process"} and "triton" not in host.baselines


def test_virtual_ranks_do_what_processes_do(gpu, tmp_path, monkeypatch, capsys):
    """The same command, once with ranks that share what passes for a GPU: the same tokens, rows and bits."""
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)
    monkeypatch.setattr(measure, "_READ_BYTES", 32 << 20)
    monkeypatch.setattr(cli, "run", lambda options, *rest: run.run(dataclasses.replace(options, device="cpu"), *rest))
    common = ["run", *SMALL, "--ranks", "3", "--dtype", "fp32"]
    there, trace = ["--json", str(tmp_path / "virtual.json")], tmp_path / "call.json"
    virtual = ["--device", "cuda", "--virtual", "--baselines", "chain,one-process", "--trace", str(trace)]
    assert cli.main([*common, *there, *virtual]) == 0
    output = capsys.readouterr().out
    assert "memory of one GPU, which virtual ranks share" in output and "of 3 workers" in output
    assert cli.main([*common, "--baselines", "none", "--json", str(tmp_path / "processes.json")]) == 0
    virtual, processes = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("virtual", "processes"))
    for same in ("routing", "error", "rows_computed", "flops", "bytes_per_peer"):
        assert virtual[same] == processes[same], same
    assert virtual["run"]["virtual"] and not processes["run"]["virtual"]
    assert virtual["bytes"]["sent"] == processes["bytes"]["sent"] > 0 and "link" not in virtual
    assert [one["name"] for one in virtual["baselines"]] == ["chain", "one-process"]
    assert all(one["relative_error"] < 1e-5 for one in virtual["baselines"])
    assert (virtual["timeline"]["workers"], virtual["timeline"]["lost_events"]) == (3, 0)
    entries = json.loads(trace.read_text())["traceEvents"]
    lanes = [(one["pid"], one["args"]["name"]) for one in entries if one["name"] == "thread_name"]
    assert lanes == [(rank, f"SM {rank}, block 0") for rank in range(3)]
    assert any(one["ph"] == "s" for one in entries), "arrows"
    assert trace.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(read_records(tmp_path)) == 2, "both follow their schema"


def test_without_matplotlib_there_is_a_timeline_and_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said, events = [], np.zeros(1, EVENT)
    events["kind"], events["end"] = UP, 10
    run_trace.write_timeline(Trace([RankTrace(0, [events], 0)]), tmp_path / "call.json", said.append)
    assert len(said) == 1 and said[0].startswith("no picture of the timeline: ") and "matplotlib" in said[0]
    assert [file.name for file in tmp_path.iterdir()] == ["call.json"]


def test_torchrun_starts_the_ranks(tmp_path):
    trace = tmp_path / "call.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "flashmoe", "run",
        *SMALL, "--baselines", "none", "--trace", str(trace), "--json", str(tmp_path / "run.json"),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    one_speaks = [done.stdout.count(words) for words in ("OK mixtral-8x7b/64 fp32, 2 x 24 tokens", "machine ")]
    assert one_speaks == [1, 1]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["run"]["ranks"] == record["timeline"]["workers"] == 2
    assert {one["pid"] for one in json.loads(trace.read_text())["traceEvents"]} == {0, 1}
