"""The commands of ``flashmoe bench``, one table: each is a module with HELP, DESCRIPTION, add_options() and run()."""

import argparse
from types import ModuleType

from .simulation import command as scale

COMMANDS: dict[str, ModuleType] = {"scale": scale}


def add_bench(commands: argparse._SubParsersAction) -> None:
    """Put ``bench`` and its commands among the others."""
    bench = commands.add_parser("bench", help="measure or predict: " + ", ".join(COMMANDS))
    benches = bench.add_subparsers(required=True, metavar="BENCH")
    for name, module in COMMANDS.items():
        parser = benches.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        module.add_options(parser)
        parser.set_defaults(command=module.run, parser=parser)
