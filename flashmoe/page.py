"""One static HTML page of measurements: figures, every number, and how each was made; and the README's table."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from .figures import draw_all
from .records import Record, markdown_table, read_records
from .report import milliseconds, percent
from .simulation.figures import draw_scale

README_BEGIN, README_END = "<!-- from bench/results by `flashmoe report` -->", "<!-- until here -->"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25rem .6rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f6f8 } figure { margin: 2rem 0; overflow-x: auto }
figcaption { color: #555 } code { font-size: 12px } details { margin: .2rem 0 }
"""


def write_report(results: Path, out: Path, readme: Path | None) -> list[Path]:
    """Draw the figures and ``index.html`` of the records in ``results`` into ``out``, and the README's table.

    Raises:
        ValueError: a record that does not follow its schema, none at all, or a README without the two marks.
        RuntimeError: matplotlib or jsonschema is not installed.
        OSError: a file cannot be written.
    """
    try:
        records = read_records(results)
        text = readme_with_table(readme.read_text(), records) if readme is not None else None
        out.mkdir(parents=True, exist_ok=True)
        figures = draw_all(records, out) + draw_scale(results, out)
    except ImportError as error:
        raise RuntimeError(f"flashmoe report needs {error.name}: pip install 'flashmoe[bench]'") from error
    index = out / "index.html"
    index.write_text(page(records, figures))
    if readme is not None:
        readme.write_text(text)
    return [index, *(path for path, _ in figures), *([readme] if readme is not None else [])]


def readme_with_table(text: str, records: Sequence[Record]) -> str:
    """The README with its table as these records have it.

    Raises:
        ValueError: the marks are missing.
    """
    if text.count(README_BEGIN) != 1 or text.count(README_END) != 1:
        raise ValueError(f"the README must have the marks {README_BEGIN} and {README_END} once each")
    shown = (("fp32", 1), ("fp32", 512), ("bf16", 512))
    chosen = [record for record in records if (record.dtype, record.tokens) in shown]
    before, rest = text.split(README_BEGIN)
    return f"{before}{README_BEGIN}\n{markdown_table(chosen)}\n{README_END}{rest.split(README_END)[1]}"


def page(records: Sequence[Record], figures: Sequence[tuple[Path, str]]) -> str:
    """Everything in one file: the figures stand in it."""
    drawn = "\n".join(
        f"<figure>{_svg(path)}<figcaption>{html.escape(caption)}</figcaption></figure>" for path, caption in figures
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>flashmoe: measurements</title><style>{_STYLE}</style>
<h1>flashmoe: measurements</h1>
<p>{len(records)} runs of <code>flashmoe run</code>. Shares and ratios are medians over rounds in which all contenders
take turns, with quartiles; the <i>floor</i> is the larger of FLOPs at the fp32 GEMM rate and touched weights at the
read bandwidth, both measured in the same run.</p>
{drawn}
<h2>Every run</h2>
{_table(records)}
<h2>How each was made</h2>
{"".join(map(_making, records))}
</html>
"""


def _svg(path: Path) -> str:
    """The drawing alone, with names that clash with no other drawing's on the page."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{path.stem}-", text)


def _table(records: Sequence[Record]) -> str:
    head = "layer, dtype, T, W, median, 95 %, GFLOP/s, floor, share, error, fastest rival, faster by".split(", ")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for record in records:
        data, rival = record.data, record.rival()
        latency, floor = data["latency"], data["floor"]
        low, high = floor["share_of_speed_quartiles"]
        cells = [
            record.layer, record.dtype, str(record.tokens), str(record.ranks), milliseconds(latency["p50"]),
            milliseconds(latency["p95"]), f"{latency['gflops']:.1f}", milliseconds(floor["seconds"]),
            f"{percent(floor['share_of_speed'])} ({percent(low)} – {percent(high)})",
            f"{data['error']['relative']:.1e}",
            rival["name"] if rival else "", f"{rival['ratio']:.2f} ×" if rival else "",
        ]  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _making(record: Record) -> str:
    data = record.data
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    machine = data["machine"]
    facts = [
        f"<code>{html.escape(' '.join(data['command']))}</code>", html.escape(versions),
        html.escape(f"{machine['processor']} ({machine['isa']}), {machine['usable_cores']} cores, {data['started']}"),
    ]  # fmt: skip
    return f"<details><summary>{html.escape(record.name)}</summary>{'<br>'.join(facts)}</details>"
