"""flashmoe report: what the records say is what the page, the figures and the documents show."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashmoe import documents, figures, micro_figures, schema
from flashmoe.cli import main
from flashmoe.documents import with_tables
from flashmoe.drawing import draw_all
from flashmoe.layer_tables import runs
from flashmoe.report import milliseconds, seconds_of
from flashmoe.results import read_results
from flashmoe.simulation import figures as scale_figures

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKED = {path: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
          if "<!-- from bench/results" in path.read_text()}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return read_results(RESULTS)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The report of the committed records."""
    folder = tmp_path_factory.mktemp("report")
    assert main(["report", str(RESULTS), "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("path", MARKED, ids=lambda path: path.name)
def test_documents_say_what_the_committed_records_say(results, path):
    assert MARKED[path] == with_tables(path, MARKED[path], results), (
        f"run `flashmoe report --tables {' '.join(str(each.relative_to(ROOT)) for each in MARKED)}`"
    )


def test_every_table_stands_in_a_document():
    assert {ROOT / "README.md", ROOT / "docs" / "status.md", ROOT / "docs" / "simulation.md"} <= set(MARKED)
    shown = re.findall(r"<!-- from bench/results: ([\w-]+) -->", "".join(MARKED.values()))
    assert sorted(shown) == sorted(documents.NAMES)


def test_table_tells_what_the_record_holds(results):
    record = next(one for one in results.runs if one.name == "mixtral-4.w2.t512.fp32")
    (line,) = runs([record]).splitlines()[2:]
    data = json.loads((RESULTS / "mixtral-4.w2.t512.fp32.json").read_text())
    pipelines = [one for one in data["baselines"] if one["name"].startswith("pipeline-")]
    fastest = min(pipelines, key=lambda one: one["p50"])
    assert "mixtral-8x7b / 4, fp32 | 512 · 2" in line
    assert f"{data['floor']['share_of_speed'] * 100:.0f} %" in line
    assert f"| {fastest['name']} | {fastest['ratio']:.2f} ×" in line


def test_page_holds_every_record_and_every_figure(drawn, results):
    names = [name for part in (figures, micro_figures, scale_figures) for name, *_ in part.FIGURES]
    assert sorted(path.stem for path in drawn.glob("*.svg")) == sorted(names)
    for name in names:
        assert ElementTree.parse(drawn / f"{name}.svg").getroot().tag.endswith("svg")
    page = (drawn / "index.html").read_text()
    assert page.count("<svg") == len(names) and page.count("<summary>") == len(results.runs) + 2
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)), "two figures share a name, so one would show parts of the other"
    for record in results.runs:
        latency = record.data.get("latency")
        assert (f"{latency['gflops']:.1f}" if latency else f"<td>{milliseconds(record.rival()['p50'])}</td>") in page
    for one in results.micro.operations:
        assert f"<td>{one.name}</td><td>{seconds_of(one.median)}</td>" in page
    for one in results.scale["gpus"]:
        assert one["model"] in page
    assert "http-equiv" not in page and "<script" not in page


def test_figures_are_the_same_whenever_they_are_drawn(drawn, results, tmp_path):
    quick = [figure for figure in figures.FIGURES if figure[0] in ("scaling", "memory")]
    for path, _ in draw_all(results.runs, tmp_path, quick, png=True):
        assert path.read_bytes() == (drawn / path.name).read_bytes(), path.name
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def _without(*path):
    """A change that takes away what stands there."""

    def change(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


def _with(value, *path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


RUN, MICRO, SCALE = "qwen3.w1.t1.fp32.json", "micro.json", "scale.json"


def _backward(change=lambda data: None):
    """A record of the backward pass, which the layer has not, and a change of it."""

    def made(data):
        errors = dict.fromkeys(("x", "topk_weights", "gate_up_proj", "down_proj"), 1e-7)
        del data["latency"], data["floor"]["share_of_speed"], data["floor"]["share_of_speed_quartiles"]
        data["run"]["passes"], data["timed"] = "backward", "all"
        data["flops_by_product"] = dict.fromkeys(("forward", "row_gradients", "weight_gradients"), data["flops"])
        data["bytes"] = dict.fromkeys(
            ("weights", "x", "y", "between", "sent", "weight_gradients", "grad_x", "grad_y"), 1
        )  # fmt: skip
        data["gradient_check"] = {"bounds": errors, "tokens": 1, "experts": [0]}
        for one in data["baselines"]:
            one["gradient_errors"] = errors
            one.pop("ratio", None)
        data["baselines"].insert(0, {"name": "flashmoe", "skipped": "no backward"})
        change(data)

    return made


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (RUN, _backward(_without("baselines", 0)), r"\$\.baselines: .* does not contain items matching"),
        (RUN, _backward(_with("forward", "run", "passes")), r"\$\.run\.passes: 'backward' was expected"),
        (RUN, _backward(_without("baselines", 1, "gradient_errors")), r"\$\.baselines\[1\]"),
        (RUN, _backward(_without("gradient_check")), r"\$: 'gradient_check' is a required property"),
        (RUN, _without("latency"), r"\$\.run: 'passes' is a required property"),
        (RUN, _without("floor", "share_of_speed"), r"\$\.floor: 'share_of_speed' is a required property"),
        (RUN, _without("machine", "processor"), r"\$\.machine: 'processor' is a required property"),
        (RUN, _with(False, "ok"), r"\$\.ok: True was expected"),
        (RUN, _with(0, "latency", "p50"), r"\$\.latency\.p50: 0 is less than or equal to the minimum of 0"),
        (RUN, _without("baselines", 0, "ratio"), r"\$\.baselines\[0\]"),
        (RUN, _with("fp8", "run", "dtype"), r"\$\.run\.dtype: 'fp8' is not one of"),
        (MICRO, _without("flashmoe", "versions", "commit"), r"\$\.flashmoe\.versions: 'commit' is a required property"),
        (MICRO, _with(0, "benchmarks", 3, "stats", "median"), r"\$\.benchmarks\[3\]\.stats\.median: 0 is less"),
        (MICRO, _with("1 MB/s", "benchmarks", 0, "extra_info", "bytes_per_s"), r"bytes_per_s: '1 MB/s' is not of type"),
        (MICRO, _with([], "benchmarks"), r"\$\.benchmarks: \[\] should be non-empty"),
        (SCALE, _without("gpus", 5, "hidden_share"), r"\$\.gpus\[5\]: 'hidden_share' is a required property"),
        (SCALE, _with(1.2, "uneven", 0, "utilisation"), r"\$\.uneven\[0\]\.utilisation: 1\.2 is greater"),
        (SCALE, _with("8", "paper", 0, "gpus"), r"\$\.paper\[0\]\.gpus: '8' is not of type 'integer'"),
        (SCALE, _without("machines", "h100", "near", "staged"), r"\$\.machines\.h100\.near: 'staged' is a required"),
        (SCALE, _without("validation", "runs", 0, "error"), r"\$\.validation\.runs\[0\]: 'error' is a required"),
    ],
)  # fmt: skip
def test_record_that_breaks_its_schema_is_named(tmp_path, name, change, told, capsys):
    data = schema.read_json(RESULTS / name)
    change(data)
    (tmp_path / "broken.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"broken\.json: .*" + told):
        read_results(tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "broken.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_record_of_the_backward_pass_that_the_layer_has_not(tmp_path, results):
    data = schema.read_json(RESULTS / RUN)
    _backward()(data)
    (tmp_path / "one.json").write_text(json.dumps(data))
    (tmp_path / RUN).write_text((RESULTS / RUN).read_text())
    forward, backward = read_results(tmp_path).runs
    assert (forward.passes, backward.passes) == ("forward", "backward")
    assert backward.rival()["name"] == forward.rival()["name"] and backward.compared("flashmoe") is None
    assert runs([forward, backward]) == runs([forward])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "index.html").read_text().count("<td>no backward</td>") == 1


def test_other_json_is_left_out_and_named(tmp_path, capsys):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    with pytest.raises(ValueError, match="holds no record"):
        read_results(tmp_path)
    (tmp_path / RUN).write_text((RESULTS / RUN).read_text())
    assert [path.name for path in read_results(tmp_path).others] == ["trace.json"]
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match=r"half\.json is not JSON"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no marks", "must have tables between marks in pairs"),
        ("<!-- from bench/results: runs -->\n", "must have tables between marks in pairs"),
        ("<!-- from bench/results: runs -->\n<!-- until here --> <!-- until here -->", "must have tables"),
        ("<!-- from bench/results: walks -->\n<!-- until here -->", "there is no table 'walks', only runs, aims"),
        ("<!-- from bench/results: fixed-costs -->\n<!-- until here -->", "no record for the table 'fixed-costs'"),
    ],
)
def test_document_that_cannot_be_filled_is_refused_and_left_alone(tmp_path, text, told, capsys):
    (tmp_path / RUN).write_text((RESULTS / RUN).read_text())
    document = tmp_path / "page.md"
    document.write_text(text)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out"), "--tables", str(document)]) == 1
    error = capsys.readouterr().err
    assert told in error and "page.md" in error
    assert document.read_text() == text and not (tmp_path / "out").exists()
