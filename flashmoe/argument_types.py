"""What the command line's arguments may be: each type says what it expected, and what came."""

import argparse

from . import baselines


def count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def baseline_names(text: str) -> str | list[str]:
    if text == "all":
        return text
    names = [] if text == "none" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in baselines.NAMES:
            raise argparse.ArgumentTypeError(f"must be all, none or from {', '.join(baselines.NAMES)}, got {name!r}")
    return names
