"""flashmoe report: what the records say is what the page, the figures and the README show."""

import copy
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashmoe.cli import main
from flashmoe.page import README_BEGIN, README_END, readme_with_table
from flashmoe.records import markdown_table, read_records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def records():
    return read_records(RESULTS)


def test_readme_table_is_drawn_from_the_committed_records(records):
    text = (ROOT / "README.md").read_text()
    assert text == readme_with_table(text, records), "run `flashmoe report --readme README.md`"


def test_table_tells_what_the_record_holds(records):
    record = next(r for r in records if r.name == "mixtral-4.w2.t512.fp32")
    (line,) = markdown_table([record]).splitlines()[2:]
    data = json.loads((RESULTS / "mixtral-4.w2.t512.fp32.json").read_text())
    pipelines = [one for one in data["baselines"] if one["name"].startswith("pipeline-")]
    fastest = min(pipelines, key=lambda one: one["p50"])
    assert "mixtral-8x7b / 4, fp32 | 512 · 2" in line
    assert f"{data['floor']['share_of_speed'] * 100:.0f} %" in line
    assert f"| {fastest['name']} | {fastest['ratio']:.2f} ×" in line


def test_page_holds_every_run_and_every_figure(tmp_path, capsys, records):
    assert main(["report", str(RESULTS), "--out", str(tmp_path)]) == 0
    files = capsys.readouterr().out.split()
    drawn = [Path(name) for name in files if name.endswith(".svg")]
    assert [path.stem for path in drawn] == ["latency", "throughput", "speedups", "scaling", "memory",
                                             "scale-validation", "scale-paper", "scale-gpus"]  # fmt: skip
    for path in drawn:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == len(drawn) and page.count("<summary>") == len(records)
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)), "two figures share a name, so one would show parts of the other"
    for record in records:
        assert f"{record.data['latency']['gflops']:.1f}" in page
    assert "http-equiv" not in page and "<script" not in page


def test_figures_are_the_same_whenever_they_are_drawn(tmp_path):
    for folder in ("first", "second"):
        assert main(["report", str(RESULTS), "--out", str(tmp_path / folder)]) == 0
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data["machine"].pop("processor"), r"\$\.machine: 'processor' is a required property"),
        (lambda data: data.update(ok=False), r"\$\.ok: True was expected"),
        (lambda data: data["latency"].update(p50=0), r"\$\.latency\.p50: 0 is less than or equal to the minimum of 0"),
        (lambda data: data["baselines"][0].pop("ratio"), r"\$\.baselines\[0\]"),
        (lambda data: data["run"].update(dtype="fp8"), r"\$\.run\.dtype: 'fp8' is not one of"),
    ],
)
def test_record_that_breaks_its_schema_is_named(tmp_path, records, change, told, capsys):
    data = copy.deepcopy(records[0].data)
    change(data)
    (tmp_path / "broken.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"broken\.json: " + told):
        read_records(tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "broken.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folder_without_records_and_readme_without_marks_are_refused(tmp_path, records):
    with pytest.raises(ValueError, match="holds no record"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="once each"):
        readme_with_table(f"{README_BEGIN} {README_BEGIN} {README_END}", records)
