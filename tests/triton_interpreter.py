"""Run with TRITON_INTERPRET=1: the Triton baseline's worst error for each case of CASES, as a line of JSON."""

import json

import torch
from baseline_case import drawn_problem, worst_error

from flashmoe import baselines

CASES = {
    "gated": (9, 2, 4, 48, 40, {}),
    "ungated, one expert a token": (5, 1, 3, 33, 17, {"gated": False, "activation": "relu"}),
    "empty experts": (7, 2, 6, 32, 32, {"used": 2, "activation": "gelu"}),
    "one token": (1, 3, 5, 40, 24, {"activation": "gelu_tanh"}),
    "more rows than a block": (40, 2, 2, 16, 8, {}),
    "float16": (6, 2, 3, 32, 32, {"dtype": torch.float16}),
}

if __name__ == "__main__":
    errors = {}
    for name, (*sizes, how) in CASES.items():
        problem = drawn_problem(*sizes, **how)
        errors[name] = worst_error(problem, [call() for call in baselines.baseline("triton").make(problem)])
    print(json.dumps(errors))
