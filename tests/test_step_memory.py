"""A step of a narrow network takes no memory for the rows of its batch."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource
import torch
from torch import nn
import mlp_ext

model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())))
step = mlp_ext.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.01))
x, y = torch.rand(2**16, 64), torch.rand(2**16, 64)

def peak(rows):
    step(x[:rows], y[:rows])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(peak(2**12), peak(2**16))
"""


def test_step_takes_no_memory_for_rows() -> None:
    # One layer's output of all rows alone would be 16 MiB.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    few, many = map(int, done.stdout.split())  # KiB
    assert many - few < 4 * 1024
