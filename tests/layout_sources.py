"""The sources as the rules of layout see them: text, and what each file includes."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "flashmoe", "tests", "bench", "docs", "tools")
SUFFIXES = {".py", ".h", ".hpp", ".cuh", ".cpp", ".cu"}


def read_sources() -> dict[str, str]:
    paths = [ROOT / "setup.py"]
    for folder in FOLDERS:
        paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES and "__pycache__" not in p.parts]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


def core(sources):
    return {path: text for path, text in sources.items() if path.startswith("csrc/")}


def without_comments(text: str) -> str:
    """C++ with its comments blanked and its strings kept."""
    tokens = r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/'
    return re.sub(tokens, lambda m: m[0] if m[0][0] == '"' else " ", text, flags=re.S)


def code_only(text: str) -> str:
    """C++ without comments, and with empty strings."""
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', without_comments(text))


def includes(text: str) -> list[tuple[str, bool]]:
    """(name, whether in angle brackets) of each #include."""
    found = re.findall(r'^[ \t]*#[ \t]*include[ \t]*(?:<([^>]+)>|"([^"]+)")', without_comments(text), flags=re.M)
    return [(angle or quoted, bool(angle)) for angle, quoted in found]
