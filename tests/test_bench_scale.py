"""flashmoe bench scale: what it prints, writes and refuses; and that its record says what the library is."""

import json
from pathlib import Path

import pytest

from flashmoe.bench_cli import COMMANDS
from flashmoe.cli import main
from flashmoe.schema import check
from flashmoe.simulation import paper, studies, tables, validation
from flashmoe.simulation.record import KIND, SCHEMA

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"


def test_prints_a_line_for_each_count_and_writes_the_same(capsys, tmp_path):
    file = tmp_path / "scale.json"
    assert main(["bench", "scale", "--gpus", "8,16", "--tokens", "64", "--slow", "2", "--json", str(file)]) == 0
    output = capsys.readouterr().out
    record = json.loads(file.read_text())
    check(file, record, SCHEMA)
    assert record["schema"] == KIND and record["command"][:3] == ["flashmoe", "bench", "scale"]
    assert [one["gpus"] for one in record["gpus"]] == [8, 16]
    assert "no GPU has run this" in output and "rank 0 x 2" in output
    for one in record["gpus"]:
        assert tables.microseconds(one["seconds"]) in output
        assert 0 < one["utilisation"] < 1 and one["exposed_seconds"] >= 0
        assert one["seconds"] < one["busy_seconds"]["up"] * 100


def test_a_second_group_of_ranks_doubles_the_tokens_and_takes_as_long(capsys, tmp_path):
    file = tmp_path / "scale.json"
    assert (
        main(["bench", "scale", "--model", "mixtral-8x7b", "--gpus", "8,16", "--tokens", "64", "--json", str(file)])
        == 0
    )
    one, two = json.loads(file.read_text())["gpus"]
    assert (one["ep_size"], two["ep_size"], one["seconds"]) == (8, 8, two["seconds"])
    assert two["tokens_per_s"] == pytest.approx(2 * one["tokens_per_s"])


def test_what_does_not_fit_is_named_and_not_simulated(capsys, tmp_path):
    command = ["bench", "scale", "--model", "deepseek-v3", "--gpus", "8", "--tokens", "64", "--layers", "58"]
    assert main([*command, "--json", str(tmp_path / "scale.json")]) == 0
    check(tmp_path, json.loads((tmp_path / "scale.json").read_text()), SCHEMA)
    assert "deepseek-v3, 8 GPUs, 64 tokens: needs 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--skew", "cold"], "argument --skew: must be uniform, zipf:S"),
        (["--gpus", "8,x"], "argument --gpus: must be an integer of at least 1"),
        (["--slow", "0"], "argument --slow: must be a number above 0"),
        (["--late", "-5"], "argument --late: must be a number above 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "scale", *arguments])
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_failures_are_one_line(capsys):
    assert main(["bench", "scale", "--gpus", "8", "--follow", "3", "--tokens", "8"]) == 1
    assert "FAILED 3 followed ranks do not divide a world of 8" in capsys.readouterr().err
    assert main(["bench", "scale", "--quick"]) == 1
    assert "FAILED --quick is for --study all" in capsys.readouterr().err
    assert main(["bench", "scale", "--experts", "4"]) == 1
    assert "top_k, 8, got 4" in capsys.readouterr().err


def test_quick_asks_some_of_everything(monkeypatch, tmp_path):
    """Which points, not their answers, that take a minute."""
    asked = {"gpus": [], "paper": []}
    monkeypatch.setattr(studies, "answer", lambda scenarios, report: asked["gpus"].extend(scenarios) or [])
    monkeypatch.setattr(paper, "reproduce", lambda report, chosen: asked["paper"].extend(chosen) or [])
    monkeypatch.setattr(validation, "compare", lambda records, fit: [])
    file = tmp_path / "scale.json"
    assert main(["bench", "scale", "--study", "all", "--quick", "--json", str(file)]) == 0
    check(file, json.loads(file.read_text()), SCHEMA)
    every = studies.all_models()
    assert {s.shape.name for s in asked["gpus"]} == {s.shape.name for s in every} and len(asked["gpus"]) < len(every) / 2
    assert all(scenario in every for scenario in asked["gpus"])
    assert {point.experiment[:4] for point in asked["paper"]} == {"late", "weak"}
    assert all(point in paper.PUBLISHED for point in asked["paper"]) and len(asked["paper"]) < len(paper.PUBLISHED)


def test_every_bench_can_be_asked_what_it_does(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main(["bench", name, "--help"])
        assert end.value.code == 0 and f"flashmoe bench {name}" in capsys.readouterr().out


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "scale.json").read_text())


def test_committed_record_tells_how_it_was_made(committed):
    check(RESULTS / "scale.json", committed, SCHEMA)
    assert committed["versions"]["commit"]
    # Nothing that a schema of the whole should have and has not.
    assert set(committed) == set(SCHEMA["properties"])
    assert committed["command"] == [
        "flashmoe",
        "bench",
        "scale",
        "--study",
        "all",
        "--json",
        "bench/results/scale.json",
    ]
    assert set(committed["machines"]) == {"h100", "h200"}
    for name in ("validation", "paper", "gpus", "uneven", "fewer_senders", "following_fewer"):
        assert tables.TABLES[name](committed[name])


def test_committed_record_answers_every_question(committed):
    assert [(p["gpus"], p["tokens"], p["experts"], p["published_s"]) for p in committed["paper"]] == [
        (p.gpus, p.tokens, p.experts, p.milliseconds / 1e3) for p in paper.PUBLISHED
    ]
    asked = studies.all_models()
    assert [(one["model"], one["gpus"], one["tokens"]) for one in committed["gpus"]] == [
        (s.shape.name, s.num_gpus, s.tokens) for s in asked
    ]
    assert {s.num_gpus for s in asked} == set(studies.GPU_COUNTS) and studies.GPU_COUNTS[-1] == 1024
    assert all(abs(one["error"]) < 0.02 for one in committed["following_fewer"] if one["follow"] > 1)
    assert sum("rejected" in one for one in committed["gpus"]) == 3
