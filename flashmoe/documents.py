"""Tables and sentences in documents that are drawn from records, between marks that name them.

    <!-- from bench/results: runs -->
    what `flashmoe report --tables FILE` writes
    <!-- until here -->
"""

import re
from collections.abc import Callable
from pathlib import Path

from . import layer_tables, micro_tables
from .results import Results
from .simulation import documents as scale

_MARKED = re.compile(r"<!-- from bench/results: (?P<name>[\w-]+) -->\n.*?<!-- until here -->", re.DOTALL)
_MARK = re.compile(r"<!-- (?:from bench/results|until here)")

# By the name in the mark: what is drawn of a kind of record.
_OF_RUNS: dict[str, Callable] = layer_tables.TABLES
_OF_MICRO: dict[str, Callable] = micro_tables.TABLES
_OF_SCALE: dict[str, Callable] = scale.TABLES
NAMES = (*_OF_RUNS, *_OF_MICRO, *_OF_SCALE)


def with_tables(path: Path, text: str, results: Results) -> str:
    """The text with everything between marks as these records have it.

    Raises:
        ValueError: there are no marks, one has no partner, or asks for what is not there; names ``path``.
    """

    def drawn(match: re.Match) -> str:
        name = match["name"]
        return f"<!-- from bench/results: {name} -->\n{_drawn(path, name, results)}\n<!-- until here -->"

    new, found = _MARKED.subn(drawn, text)
    if not found or len(_MARK.findall(text)) != 2 * found:
        raise ValueError(
            f"{path} must have tables between marks in pairs, <!-- from bench/results: NAME --> and <!-- until here -->"
        )
    return new


def _drawn(path: Path, name: str, results: Results) -> str:
    for tables, record in ((_OF_RUNS, results.runs), (_OF_MICRO, results.micro), (_OF_SCALE, results.scale)):
        if name in tables:
            if not record:
                raise ValueError(f"{path}: no record for the table {name!r}")
            return tables[name](record)
    raise ValueError(f"{path}: there is no table {name!r}, only {', '.join(NAMES)}")
