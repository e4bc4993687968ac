"""Each path of the plan once, small: what compute-sanitizer runs. `python tests/sanitized.py [own]`

own: only where all kernels are ours.
"""

import sys

import torch
from references import native, results
from shapes import Shape, grad_output, operands

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench.training import make_mlp

SHAPES = [
    Shape((10,), 10, 5),
    Shape((33,), 65, 17),
    Shape((16411,), 32, 32),
    Shape((65539,), 17, 16),
    Shape((515,), 515, 264),
    Shape((520,), 2048, 1032),
]
NETS = {(10, 5, 1): 10, (64, 300, 10): 200}  # widths: batch; in one block, layer by layer
major, minor = torch.cuda.get_device_capability()


def is_own(shape: Shape, dtype: torch.dtype) -> bool:
    sizes = (shape.leading[0], shape.K, shape.N)
    name = str(dtype).removeprefix("torch.")
    plan = _C.cuda_plan(
        *sizes, name, "relu", 10 * major + minor, aligned=shape.K % 8 == shape.N % 8 == 0
    )
    return {plan["forward"], plan["backward"]} <= {"small", "tall"}


with torch.device("cuda"):
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            if "own" in sys.argv and not is_own(shape, dtype):
                continue
            given, dy = operands(shape, dtype), grad_output(shape, dtype)
            for activation in ("relu", "sigmoid"):
                found = results(mlp_ext.linear_act, given, activation, dy)
                here = {name: t.cpu() for name, t in given.items()}
                expected = results(native, here, activation, dy.cpu())
                for name, t in expected.items():
                    torch.testing.assert_close(found[name].cpu(), t, rtol=0.1, atol=0.1)
    for widths, batch in NETS.items():
        model = make_mlp(widths).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        step = mlp_ext.TrainStep(model, torch.nn.MSELoss(), optimizer)
        for _ in range(2):
            assert step(torch.rand(batch, widths[0]), torch.rand(batch, widths[-1])).isfinite()
    models = [make_mlp((10, 5, 1)).cuda() for _ in range(3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in models]
    steps = mlp_ext.TrainSteps(models, torch.nn.MSELoss(), optimizers)
    losses = steps.fit(torch.rand(20, 10), torch.rand(20, 1), epochs=2, batch_size=8)
    assert losses.isfinite().all()
