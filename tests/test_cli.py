"""The command line, mostly as its users meet it: real runs of small layers, and what it says when one goes wrong."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flashmoe import _C, accuracy, activations, baselines, cli, contention, measure, run, run_world
from flashmoe.baselines import hugging_face
from flashmoe.models import SHAPES
from flashmoe.routing import Routing

SMALL = ["--tokens", "24", "--iters", "3", "--warmup", "1", "--seconds", "2"]


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    """The machine's rates by small measurements in this process; its ranks make the full ones."""
    monkeypatch.setattr(measure, "_GEMM_SIZE", 256)
    monkeypatch.setattr(measure, "_READ_BYTES", 32 << 20)


def run_cli(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and stdout of ``flashmoe run`` in this process."""
    code = cli.main(["run", *SMALL, *arguments])
    return code, capsys.readouterr().out


def last_line(output: str) -> str:
    return output.rstrip().rsplit("\n", 1)[-1]


def test_one_process_beside_hugging_face(capsys, tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "run.json"
    code, output = run_cli(capsys, "--model", "mixtral-8x7b", "--scale", "64", "--ranks", "1", "--json", str(file))
    assert code == 0, output
    assert last_line(output).startswith("OK mixtral-8x7b/64 fp32, 1 x 24 tokens")
    record = json.loads(file.read_text())
    assert (record["schema"], record["ok"], record["failure"]) == (1, True, None)
    assert record["command"][:2] == ["flashmoe", "run"] and "mixtral-8x7b" in record["command"]
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["usable_cores"] >= 1
    assert (record["shape"]["hidden_size"], record["shape"]["intermediate_size"]) == (64, 224)
    assert record["flops"] == 2 * 24 * 2 * (64 * 224 * 3)
    assert record["error"]["relative"] <= record["error"]["bound"] < 1e-5
    assert record["error"]["checked_tokens"] == 24 and record["error"]["bitwise_repeat"]
    assert 0 < record["latency"]["p50"] <= record["latency"]["p95"]
    low, high = record["latency"]["quartiles"]
    assert low <= record["latency"]["p50"] <= high
    assert record["rates"]["gemm_gflops"] > 0.1 and record["rates"]["read_gb_s"] > 0.01
    floor = record["floor"]
    assert floor["seconds"] == max(floor["compute_seconds"], floor["read_seconds"])
    # The same layer by someone else's code is nobody's copy of ours: their results must agree with the reference.
    names = ["hf-eager", "hf-grouped_mm", "hf-batched_mm", "chain", "ceiling"]
    assert [one["name"] for one in record["baselines"]] == names
    for one in record["baselines"]:
        assert one["ratio"] > 0 and one["samples"] >= 1, one
        assert one["name"] == "ceiling" or one["relative_error"] < 1e-5, one
        assert one["name"] in output


def test_ungated_layer_beside_hugging_face_in_bf16(capsys, tmp_path):
    pytest.importorskip("transformers")
    file = tmp_path / "run.json"
    code, output = run_cli(
        capsys, "--model", "flashmoe-paper", "--scale", "16", "--ranks", "1", "--dtype", "bf16", "--input", "random",
        "--baselines", "hf-eager,hf-grouped_mm", "--json", str(file),
    )  # fmt: skip
    assert code == 0, output
    record = json.loads(file.read_text())
    assert not record["shape"]["gated"] and record["run"]["input"] == "random"
    assert 1e-4 < record["error"]["relative"] <= record["error"]["bound"] < 0.03  # bf16 rounds, and no more than that
    assert [one["name"] for one in record["baselines"]] == ["hf-eager", "hf-grouped_mm"]
    assert all(one["relative_error"] < 0.03 for one in record["baselines"])


def test_two_processes_from_a_shell(tmp_path):
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "flashmoe", "run", *SMALL, "--scale", "16", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert last_line(done.stdout).startswith("OK qwen3-30b-a3b/16 fp32, 2 x 24 tokens")
    assert "weights" in done.stderr and "timing" in done.stderr  # progress is on stderr, not among the results
    record = json.loads(file.read_text())
    assert record["run"]["ranks"] == 2 and record["run"]["transport"] == "shared memory"
    rows = 2 * 24 * 8
    assert record["routing"]["rows"] == rows == sum(record["rows_computed"])
    assert record["routing"]["busiest_expert"] > 1
    row_bytes = 128 * 4
    for source, counts in enumerate(record["bytes_per_peer"]):
        peer = 1 - source
        assert [counts[kind][source] for kind in ("header", "rows", "results")] == [0, 0, 0]
        # A token that needs the peer goes there once, whatever the number of its experts.
        assert 0 < counts["rows"][peer] <= 24 * row_bytes and counts["rows"][peer] % row_bytes == 0
        assert counts["header"][peer] > 0 and counts["signals"][peer] > 0
        assert counts["results"][peer] % row_bytes == 0
    returned = sum(counts["results"][1 - source] for source, counts in enumerate(record["bytes_per_peer"]))
    assert 24 * row_bytes < returned < rows * row_bytes
    names = [one["name"] for one in record["baselines"]]
    assert names == ["pipeline-grouped_mm", "pipeline-loop", "one-process", "ceiling"]
    for one in record["baselines"]:
        assert one["ratio"] > 0 and (one["name"] == "ceiling" or one["relative_error"] < 1e-5), one
    itemised = record["bytes"]
    assert itemised["x"] == itemised["y"] == 2 * 24 * row_bytes and itemised["between"] == rows * 48 * 4
    assert itemised["weights"] == record["routing"]["experts_used"] * 3 * 128 * 48 * 4
    assert itemised["sent"] == sum(sum(map(sum, counts.values())) for counts in record["bytes_per_peer"])
    assert "rank 0 to rank 1" in done.stdout


def test_remote_only_with_uneven_experts_per_rank(capsys, tmp_path):
    file = tmp_path / "run.json"
    code, output = run_cli(
        capsys, "--model", "mixtral-8x7b", "--scale", "128", "--ranks", "3", "--remote-only", "5", "--dtype", "fp16",
        "--baselines", "pipeline-loop", "--json", str(file),
    )  # fmt: skip
    assert code == 0, output
    record = json.loads(file.read_text())
    assert record["run"]["transport"] == "delayed and reordered puts (seed 5)"
    assert len(record["bytes_per_peer"]) == 3 and sum(record["rows_computed"]) == 3 * 24 * 2
    assert record["baselines"][0]["relative_error"] < 0.005  # the baseline places experts like us


def test_wrong_result_fails_and_names_the_token(capsys, monkeypatch, tmp_path):
    truth = accuracy.moe_reference

    def slightly_off(*args, **kwargs):
        y = truth(*args, **kwargs)
        y[17] *= 1 + 2**-13
        return y

    monkeypatch.setattr(accuracy, "moe_reference", slightly_off)
    file = tmp_path / "run.json"
    code, output = run_cli(capsys, "--scale", "32", "--ranks", "1", "--baselines", "none", "--json", str(file))
    assert code == 1
    assert last_line(output).startswith("FAILED relative error 1.22e-04 is above its bound")
    assert "rank 0, token 17" in last_line(output)
    record = json.loads(file.read_text())
    assert not record["ok"] and "above its bound" in record["failure"] and record["error"]["worst"]["token"] == 17


def test_result_that_is_not_finite_fails(capsys, monkeypatch, tmp_path):
    def with_a_nan(*args, **kwargs):
        x = activations.text_activations(*args, **kwargs)
        x[3, 0] = torch.nan
        return x

    monkeypatch.setattr("flashmoe.run_inputs.text_activations", with_a_nan)
    file = tmp_path / "run.json"
    code, output = run_cli(capsys, "--scale", "32", "--ranks", "1", "--baselines", "none", "--json", str(file))
    assert code == 1 and last_line(output) == "FAILED the result is not finite"
    record = json.loads(file.read_text())  # strict JSON knows no NaN
    assert record["error"]["relative"] is None and record["error"]["finite"] is False


def test_other_bits_in_a_repeat_fail():
    error = {"relative": 0.0, "bound": 1e-6, "finite": True, "worst": {"rank": 0, "token": 0}}
    assert run.failure_of(error | {"bitwise_repeat": True}) is None
    assert "other bits" in run.failure_of(error | {"bitwise_repeat": False})
    assert "above its bound" in run.failure_of(error | {"bitwise_repeat": True, "relative": float("nan")})


def broken_rank(options):
    if int(os.environ["RANK"]) == 1:
        raise ArithmeticError("the cat has sat on the keyboard")
    torch.distributed.barrier()  # a peer that never comes


def test_exception_in_a_rank_fails(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_world, "run_rank", broken_rank)
    file = tmp_path / "run.json"
    code, output = run_cli(capsys, "--scale", "32", "--json", str(file))
    assert code == 1
    assert last_line(output) == "FAILED ArithmeticError: the cat has sat on the keyboard"
    assert json.loads(file.read_text())["failure"] == "ArithmeticError: the cat has sat on the keyboard"


def test_environment_becomes_part_of_the_record(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(cli, "run", lambda options, *rest: seen.append(options) or 0)
    monkeypatch.setenv("FLASHMOE_REMOTE_ONLY", "11")
    monkeypatch.setenv("FLASHMOE_NUM_WORKERS", "3")
    assert cli.main(["run", "--ranks", "4"]) == 0
    assert (seen[0].remote_only, seen[0].threads) == (11, 3)
    monkeypatch.setenv("FLASHMOE_NUM_WORKERS", "many")
    with pytest.raises(SystemExit) as exit:
        cli.main(["run"])
    assert exit.value.code == 2 and "FLASHMOE_NUM_WORKERS must be" in capsys.readouterr().err


def test_record_that_cannot_be_written_fails(capsys, tmp_path):
    code, output = run_cli(
        capsys, "--scale", "32", "--ranks", "1", "--baselines", "none", "--json", str(tmp_path / "no" / "run.json")
    )
    assert code == 1 and last_line(output).startswith("FAILED cannot write")


def test_too_little_memory_names_a_scale_that_fits(capsys, monkeypatch):
    there = 6 << 30
    monkeypatch.setattr(run, "available_memory", lambda: there)
    monkeypatch.setattr(run_world, "run_rank", lambda options: pytest.fail("nothing may be built"))
    code, output = run_cli(capsys, "--model", "deepseek-v3", "--ranks", "1")
    words = last_line(output).split()
    assert code == 1 and words[0] == "FAILED"
    assert "not enough memory: deepseek-v3" in output and "6.0 GiB are left" in output
    scale = int(words[words.index("--scale") + 1])
    shape = SHAPES["deepseek-v3"]
    weights = [shape.num_experts * shape.scaled(s).expert_elements * 4 for s in (scale // 2, scale)]
    assert weights[0] > 0.8 * there > weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-2"], "argument --model: invalid choice: 'gpt-2'"),
        (["--tokens", "0"], "argument --tokens: must be an integer of at least 1, got '0'"),
        (["--ranks", "two"], "argument --ranks: must be an integer of at least 1, got 'two'"),
        (["--model", "mixtral-8x7b", "--scale", "3"], "argument --scale: scale must divide hidden_size 4096"),
        (["--seconds", "nan"], "argument --seconds: must be a number of seconds above 0, got 'nan'"),
        (["--ranks", "1", "--remote-only", "3"], "argument --remote-only: needs --ranks of at least 2, got 1"),
        (["--baselines", "magic"], "argument --baselines: must be all, none or from"),
        (["--ranks", "2", "--baselines", "hf-eager"], "argument --baselines: with --ranks 2 choose from pipeline"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(["run", *arguments])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_missing_command(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([])
    assert exit.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_without_transformers_the_baseline_is_skipped(capsys, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, output = run_cli(capsys, "--scale", "32", "--ranks", "1", "--baselines", "hf-eager")
    assert code == 0 and "hf-eager: skipped, needs transformers 5" in output
    assert last_line(output).startswith("OK")


def test_baseline_that_would_copy_every_weight_is_skipped(monkeypatch):
    monkeypatch.setattr(hugging_face, "available_memory", lambda: 1 << 20)
    shape = SHAPES["qwen3-30b-a3b"].scaled(64)
    inputs = [(torch.zeros(64, 32), Routing(torch.zeros(64, 8, dtype=torch.int64), torch.ones(64, 8), 128))]
    problem = baselines.Problem(shape, inputs, torch.zeros(128, 24, 32), torch.zeros(128, 32, 12), [128])
    with pytest.raises(baselines.Skipped, match="copies every row's expert: .* GiB"):
        baselines.baseline("hf-batched_mm").make(problem)


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["schema"] == 1 and known["versions"]["torch"] == torch.__version__
    assert known["build"]["features"]["cuda"] is hasattr(_C, "CudaTeam") and known["devices"][0] == "cpu"
    assert known["machine"]["memory_bytes"] >= known["machine"]["available_memory_bytes"] > 0
    assert known["arena_defaults"]["max_tokens"] == 1024
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and known["build"]["isa"] in text and "NVSHMEM" in text
    found = known["found"]["nvshmem"]
    assert (found["version"] is None) == ("pip install nvidia-nvshmem" in (found["missing"] or ""))


def test_slow_contenders_get_fewer_samples():
    quick = measure.Contender("quick", lambda: time.sleep(0.001), 1)
    slow = measure.Contender("slow", lambda: time.sleep(0.1), 1)
    measure.take_turns([quick, slow], measure.Ranks(), iterations=20, warmup=1, seconds=1.0)
    assert 3 <= len(slow.samples) <= 6 and len(quick.turns) == 20
    compared = measure.speedup(quick, slow)
    assert 10 < compared["ratio"] < 120
    assert compared["ratio_quartiles"][0] <= compared["ratio"] <= compared["ratio_quartiles"][1]


def test_quantiles_interpolate():
    assert measure.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert measure.quantile([1.0, 2.0, 3.0], 0.95) == pytest.approx(2.9)
    assert measure.quantile([5.0], 0.25) == 5.0


def test_contention_is_told_from_our_own_work():
    assert contention.is_contended({"ours": 1.0, "others": 0.9, "idle": 0.1})
    assert not contention.is_contended({"ours": 1.9, "others": 0.05, "idle": 0.05})
    assert not contention.is_contended({"ours": 1.0, "others": 8.0, "idle": 23.0})
    assert not contention.is_contended(None)
    taken = contention.ProcessorTime()
    while taken.mine() < 0.15:
        pass
    shares = taken.shares(taken.mine())
    assert shares is None or 0 < shares["ours"] <= 1.05
