"""A folder of records: of ``flashmoe run`` and ``bench layer``, of ``bench micro``, and of ``bench scale``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import micro_record
from .micro_record import MicroRecord
from .records import RUN_KIND, Record, run_record
from .schema import check, kind_of, read_json
from .simulation import record as scale_record


@dataclass
class Results:
    """What a folder holds.

    Attributes:
        runs: in the order of the tables.
        micro, scale: the newest of its kind, or None; ``scale`` is as its SCHEMA says.
        others: JSON that is of no kind known here.
    """

    runs: list[Record] = field(default_factory=list)
    micro: MicroRecord | None = None
    scale: dict[str, Any] | None = None
    others: list[Path] = field(default_factory=list)


def read_results(folder: Path) -> Results:
    """Every ``*.json`` of a folder, each held against the schema that it names.

    Raises:
        ValueError: the folder has no record, or one does not follow its schema; says which, where, and what is wrong.
        ImportError: jsonschema is not installed.
    """
    results = Results()
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        kind = kind_of(data)
        if kind == RUN_KIND:
            results.runs.append(run_record(path, data))
        elif kind == micro_record.KIND:
            one = micro_record.micro_record(path, data)
            if results.micro is None or one.data["datetime"] > results.micro.data["datetime"]:
                results.micro = one
        elif kind == scale_record.KIND:
            check(path, data, scale_record.SCHEMA)
            if results.scale is None or data["started"] > results.scale["started"]:
                results.scale = data
        else:
            results.others.append(path)
    results.runs.sort(key=lambda record: record.order)
    if not (results.runs or results.micro or results.scale):
        raise ValueError(f"{folder} holds no record of `flashmoe run --json` or `flashmoe bench`")
    return results
