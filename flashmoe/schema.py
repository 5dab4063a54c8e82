"""JSON Schema 2020-12 of records: the parts that all kinds share, and the check that names a file that breaks it."""

import json
from pathlib import Path
from typing import Any

NUMBER = {"type": "number"}
POSITIVE = {"type": "number", "exclusiveMinimum": 0}
NOT_NEGATIVE = {"type": "number", "minimum": 0}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string", "minLength": 1}
MAYBE_TEXT = {"type": ["string", "null"]}
FLAG = {"type": "boolean"}
QUARTILES = {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}


def object_of(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """Of an object with these properties; what else it has is not looked at."""
    return {"type": "object", "properties": required | optional, "required": list(required)}


def list_of(items: dict[str, Any], at_least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": at_least}


def map_of(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


# How a record was made: the same in every kind.
COMMAND = list_of(TEXT, at_least=2)
STARTED = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"}
VERSIONS = object_of(
    {"flashmoe": TEXT, "commit": MAYBE_TEXT, "torch": TEXT, "python": TEXT, "transformers": MAYBE_TEXT}
)
MACHINE = object_of({"processor": TEXT, "architecture": TEXT, "isa": TEXT, "cores": COUNT, "usable_cores": COUNT,
                     "memory_bytes": COUNT, "system": TEXT})  # fmt: skip


def read_json(path: Path) -> Any:
    """
    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def kind_of(data: Any) -> Any:
    """What a record says that it follows; None where it says nothing."""
    return data.get("schema") if isinstance(data, dict) else None


def check(path: Path, data: Any, schema: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: it does not follow the schema; says which file, where, and what is wrong.
        ImportError: jsonschema is not installed.
    """
    from jsonschema import Draft202012Validator

    error = next(Draft202012Validator(schema).iter_errors(data), None)
    if error is not None:
        raise ValueError(f"{path}: {error.json_path}: {error.message}")
