"""One static HTML page of measurements: figures, every number, and how each was made."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, micro_figures
from .documents import with_tables
from .drawing import draw_all
from .micro_record import MicroRecord
from .records import Record
from .report import milliseconds, percent, seconds_of
from .results import Results, read_results
from .simulation import figures as scale_figures
from .simulation.tables import TABLES

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .25rem .6rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) td { background: #f4f6f8 } figure { margin: 2rem 0; overflow-x: auto }
figcaption { color: #555 } code, pre { font-size: 12px } pre { overflow-x: auto } details { margin: .2rem 0 }
"""
_UNITS = {"bytes": (1e9, "GB/s"), "flops": (1e9, "GFLOP/s"), "items": (1e6, "M/s")}

Drawn = Sequence[tuple[Path, str]]


def write_report(folder: Path, out: Path, documents: Sequence[Path] = (), png: bool = False) -> list[Path]:
    """Draw the figures and ``index.html`` of the records in ``folder`` into ``out``, and the tables of ``documents``.

    Args:
        png: write each figure as PNG, too.

    Raises:
        ValueError: a record that does not follow its schema, none at all, or a document that asks for no table, or for
            one that these records cannot fill.
        RuntimeError: matplotlib or jsonschema is not installed.
        OSError: a file cannot be written.
    """
    try:
        results = read_results(folder)
        texts = {path: with_tables(path, path.read_text(), results) for path in documents}
        out.mkdir(parents=True, exist_ok=True)
        drawn = {
            "layer": draw_all(results.runs, out, figures.FIGURES, png),
            "micro": draw_all(results.micro, out, micro_figures.FIGURES, png) if results.micro else [],
            "scale": draw_all(results.scale, out, scale_figures.FIGURES, png) if results.scale else [],
        }
    except ImportError as error:
        raise RuntimeError(f"flashmoe report needs {error.name}: pip install 'flashmoe[bench]'") from error
    index = out / "index.html"
    index.write_text(page(results, drawn))
    for path, text in texts.items():
        path.write_text(text)
    return [index, *(path for part in drawn.values() for path, _ in part), *documents]


def page(results: Results, drawn: dict[str, Drawn]) -> str:
    """Everything in one file: the figures stand in it."""
    parts, makings = [], []
    if results.runs:
        parts.append(f"""<h2>The layer</h2>
<p>{len(results.runs)} runs of <code>flashmoe run</code> or <code>bench layer</code>. Shares and ratios are medians over
rounds in which all contenders take turns, with quartiles; the <i>floor</i> is the larger of FLOPs at the GEMM rate and
touched weights at the read bandwidth, both measured in the same run.</p>
{_figures(drawn["layer"])}
{_runs(results.runs)}""")
        makings += [_making(record.name, record.data) for record in results.runs]
    if results.micro:
        data = results.micro.data
        parts.append(f"""<h2>What a call is made of</h2>
<p>{len(data["benchmarks"])} operations of <code>flashmoe bench micro</code>: medians of rounds, with quartiles.</p>
{_figures(drawn["micro"])}
{_operations(results.micro)}""")
        makings.append(_making(results.micro.name, data["flashmoe"] | {"started": data["datetime"]}))
    if results.scale:
        tables = (TABLES[name](found) for name, found in results.scale.items() if name in TABLES)
        parts.append(f"""<h2>More GPUs than there are here, by simulation</h2>
<p><code>flashmoe bench scale</code>: predictions. No GPU has run this.</p>
{_figures(drawn["scale"])}
{"".join(f"<pre>{html.escape(table)}</pre>" for table in tables)}""")
        makings.append(_making("scale", results.scale))
    if results.others:
        makings.append(f"<p>Of another kind: {html.escape(', '.join(path.name for path in results.others))}</p>")
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>flashmoe: measurements</title><style>{_STYLE}</style>
<h1>flashmoe: measurements</h1>
{body}
<h2>How each was made</h2>
{"".join(makings)}
</html>
"""


def _figures(drawn: Drawn) -> str:
    return "\n".join(
        f"<figure>{_svg(path)}<figcaption>{html.escape(caption)}</figcaption></figure>" for path, caption in drawn
    )


def _svg(path: Path) -> str:
    """The drawing alone, with names that clash with no other drawing's on the page."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{path.stem}-", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _runs(records: Sequence[Record]) -> str:
    head = "layer, pass, dtype, T, W, median, 95 %, GFLOP/s, floor, share, error, fastest rival, faster by".split(", ")
    rows = []
    for record in records:
        data, rival = record.data, record.rival()
        floor, latency = data["floor"], data.get("latency")
        what = [record.layer, record.passes, record.dtype, str(record.tokens), str(record.ranks)]
        if latency is None:  # of the backward pass, which the layer has not; a rival's time stands in for "faster by"
            time = milliseconds(rival["p50"]) if rival else ""
            rows.append([*what, "no backward", "", "", milliseconds(floor["seconds"]), "", "",
                         rival["name"] if rival else "", time])  # fmt: skip
            continue
        low, high = floor["share_of_speed_quartiles"]
        errors = [data["error"]["relative"], *(one["relative"] for one in data["error"].get("gradients", {}).values())]
        rows.append([
            *what, milliseconds(latency["p50"]), milliseconds(latency["p95"]), f"{latency['gflops']:.1f}",
            milliseconds(floor["seconds"]), f"{percent(floor['share_of_speed'])} ({percent(low)} – {percent(high)})",
            f"{max(errors):.1e}", rival["name"] if rival else "", f"{rival['ratio']:.2f} ×" if rival else "",
        ])  # fmt: skip
    return _table(head, rows)


def _operations(micro: MicroRecord) -> str:
    rows = []
    for one in micro.operations:
        rates = (f"{rate / _UNITS[amount][0]:.3g} {_UNITS[amount][1]}" for amount, rate in one.rates.items())
        low, high = map(seconds_of, one.quartiles)
        rows.append([one.name, seconds_of(one.median), f"{low} – {high}", ", ".join(rates)])
    return _table(("operation", "median", "quartiles", "rate"), rows)


def _making(name: str, data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)
    machine = data["machine"]
    facts = [
        f"<code>{html.escape(' '.join(data['command']))}</code>", html.escape(versions),
        html.escape(f"{machine['processor']} ({machine['isa']}), {machine['usable_cores']} cores, {data['started']}"),
    ]  # fmt: skip
    return f"<details><summary>{html.escape(name)}</summary>{'<br>'.join(facts)}</details>"
