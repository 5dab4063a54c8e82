"""``python -m flashmoe``: the same as the program ``flashmoe``."""

import sys

from .cli import main

if __name__ == "__main__":  # the ranks of a run import this module too
    sys.exit(main())
