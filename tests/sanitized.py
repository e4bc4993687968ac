"""Each path of the plan once, small: what compute-sanitizer runs. `python tests/sanitized.py`"""

import torch
from references import native, results
from shapes import Shape, grad_output, operands

import mlp_ext

SHAPES = [
    Shape((10,), 10, 5),
    Shape((33,), 65, 17),
    Shape((16411,), 32, 32),
    Shape((515,), 515, 264),
]

with torch.device("cuda"):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            given, dy = operands(shape, dtype), grad_output(shape, dtype)
            for activation in ("relu", "sigmoid"):
                found = results(mlp_ext.linear_act, given, activation, dy)
                expected = results(native, given, activation, dy)
                for name in expected:
                    torch.testing.assert_close(found[name], expected[name], rtol=0.1, atol=0.1)
