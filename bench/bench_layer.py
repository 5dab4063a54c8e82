"""The layer's benchmark as a script, for launchers: ``torchrun --nproc-per-node 8 bench/bench_layer.py --models …``.

The same as ``flashmoe bench layer``.
"""

import sys

from flashmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "layer", *sys.argv[1:]]))
