"""The cases: what can be measured, in which modes and on which shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from mlp_ext.nn import DTYPES as TORCH_DTYPES

LARGEST = 2**31 - 1  # largest size


class Layer(NamedTuple):
    """A layer: input [M, K], weight [N, K], output [M, N]. Written MxKxN."""

    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}"

    def operations(self, mode: str) -> int:
        """Floating-point operations of the GEMMs in one call."""
        gemms = {"forward": 1, "backward": 2, "full": 3}[mode]  # y; dx and dW
        return gemms * 2 * self.M * self.K * self.N

    def elements(self, mode: str) -> int:
        """Fewest elements that a call reads and writes: each operand and result once."""
        x, w, y = self.M * self.K, self.N * self.K, self.M * self.N
        forward, backward = x + w + y, 2 * (x + w + y)  # y; from dy, y, x and W, dx and dW
        return {"forward": forward, "backward": backward, "full": forward + backward}[mode]


class Net(NamedTuple):
    """A multi-layer perceptron of these widths, input first, and its batch. Written 10-5-1@10."""

    widths: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        return f"{'-'.join(map(str, self.widths))}@{self.batch}"

    def operations(self, mode: str) -> int:
        """Floating-point operations of the GEMMs in one step; the input has no gradient."""
        sizes = [k * n for k, n in pairwise(self.widths)]
        return 2 * self.batch * (3 * sum(sizes) - sizes[0])

    def elements(self, mode: str) -> int:
        """Fewest elements that a step reads and writes: rows once, weights twice."""
        return self.batch * (self.widths[0] + self.widths[-1]) + 2 * sum(
            k * n for k, n in pairwise(self.widths)
        )


class Nets(NamedTuple):
    """Networks of these widths, stepped on the same batch. Written 1000x10-5-1@10."""

    networks: int
    widths: tuple[int, ...]
    batch: int

    def __str__(self) -> str:
        return f"{self.networks}x{self.net}"

    @property
    def net(self) -> Net:
        """One of them."""
        return Net(self.widths, self.batch)

    def operations(self, mode: str) -> int:
        """Floating-point operations of the GEMMs in one step of all networks."""
        return self.networks * self.net.operations(mode)

    def elements(self, mode: str) -> int:
        """Fewest elements that a step of all reads and writes: rows once, weights twice."""
        rows = self.batch * (self.widths[0] + self.widths[-1])
        return rows + self.networks * (self.net.elements(mode) - rows)


Case = Layer | Net | Nets


def networks(case: Case) -> int:
    """How many networks a call steps; times are per network."""
    return case.networks if isinstance(case, Nets) else 1


FLOATS = tuple(str(dtype).removeprefix("torch.") for dtype in TORCH_DTYPES)
DTYPES = (*FLOATS, "tf32")  # tf32: float32 whose GEMM operands torch may round


@dataclass(frozen=True)
class Setting:
    """How cases are measured; the same for all rows of a run."""

    suite: str  # in SUITES
    mode: str  # one of the suite's modes
    activation: str = "relu"  # in ACTIVATIONS; of networks between layers, with sigmoid at the end
    optimizer: str = ""  # in OPTIMIZERS; of networks only
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    @property
    def name(self) -> str:
        """Display name without the device, as "step relu adam float32"."""
        parts = (self.mode, self.activation, self.optimizer, self.dtype)
        return " ".join(filter(None, parts))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors."""
        dtype: torch.dtype = getattr(torch, self.dtype.replace("tf32", "float32"))
        return dtype


class Suite(NamedTuple):
    modes: tuple[str, ...]  # the first is the default
    optimizer: str  # the default
    form: str  # how a case is written, for help texts
    pattern: str  # the same as a regular expression
    make: Callable[[list[int]], Case]  # from the sizes in it
    cases: tuple[Case, ...]  # published for CPUs
    cuda_cases: tuple[Case, ...]  # published for GPUs
    sweep: tuple[Case, ...] = ()  # the case `sweep`: many sizes, to find where fused loses

    def published(self, device: str) -> tuple[Case, ...]:
        return self.cuda_cases if device == "cuda" else self.cases


SIZE = "[1-9][0-9]{0,9}"
SWEEP = {  # M: KxN
    1: "8x8 64x64 1024x1024 4096x4096 4096x1 1x4096 1000x10",
    2: "16x16 512x512 4096x1000",
    7: "13x5 100x100 784x256 3000x1000",
    16: "16x16 128x128 1024x512",
    17: "33x65 300x200",
    32: "64x64 784x128 2048x2048",
    64: "10x1 64x64 512x10 1024x4096",
    100: "10x10 37x129 1000x1000",
    128: "784x10 256x256 4096x256",
    256: "30x16 64x64 784x512 4096x4096",
    500: "100x1 200x300 1031x517",
    1000: "1x1 1x1000 1000x1 17x19 333x222",
    1024: "128x128 512x2048",
    2048: "64x256 300x300 1024x1024",
    4096: "3x5 64x4 128x512 1024x256",
    8192: "256x256 512x512 100x1000",
    16384: "8x8 128x128 17x255",
    65536: "1x1 4x4 32x1 1x32 32x32 128x128 200x50 784x10 16x512",
}
MANY = (
    Nets(1000, (10, 5, 1), 10),
    Nets(64, (30, 16, 1), 32),
    Nets(64, (64, 64, 64, 10), 64),
    Nets(16, (784, 100, 10), 200),
)
SUITES = {
    "layers": Suite(
        modes=("full", "forward", "backward"),
        optimizer="",
        form="MxKxN, e.g. 64x784x256",
        pattern=f"{SIZE}(x{SIZE}){{2}}",
        make=lambda sizes: Layer(*sizes),
        cases=(
            Layer(10, 10, 5),
            Layer(64, 784, 256),
            Layer(128, 512, 256),
            Layer(4096, 64, 64),
            Layer(65536, 64, 64),
            Layer(16384, 32, 16),
            Layer(256, 1024, 1024),
            Layer(1024, 1024, 1024),
            Layer(512, 4096, 1024),
            Layer(2048, 2048, 2048),
        ),
        cuda_cases=(
            Layer(10, 10, 5),
            Layer(64, 784, 256),
            Layer(16384, 32, 16),
            Layer(65536, 64, 64),
            Layer(1048576, 64, 64),
            Layer(256, 1024, 1024),
            Layer(1024, 1024, 1024),
            Layer(2048, 2048, 2048),
            Layer(16384, 1024, 4096),
            Layer(4096, 4096, 4096),
            Layer(8192, 8192, 8192),
        ),
        sweep=tuple(
            Layer(M, K, N)
            for M, sizes in SWEEP.items()
            for K, N in (map(int, size.split("x")) for size in sizes.split())
        ),
    ),
    "train": Suite(
        modes=("step",),
        optimizer="sgd",
        form="WIDTHS@BATCH, e.g. 784-256-10@64",
        pattern=f"{SIZE}(-{SIZE})+@{SIZE}",
        make=lambda sizes: Net(tuple(sizes[:-1]), sizes[-1]),
        cases=(
            Net((10, 5, 1), 10),
            Net((784, 256, 10), 64),
            Net((784, 512, 256, 10), 128),
            Net((64, 64, 64, 64, 64), 4096),
            Net((32, 32, 32, 1), 16384),
            Net((256, 256, 256, 256), 1024),
            Net((1024, 1024, 1024, 1024), 256),
        ),
        cuda_cases=(
            Net((10, 5, 1), 10),
            Net((784, 256, 10), 64),
            Net((64, 64, 64, 64, 64), 65536),
            Net((4096, 4096, 4096, 4096), 4096),
        ),
    ),
    "many": Suite(
        modes=("step",),
        optimizer="sgd",
        form="NETWORKSxWIDTHS@BATCH, e.g. 1000x10-5-1@10",
        pattern=f"{SIZE}x{SIZE}(-{SIZE})+@{SIZE}",
        make=lambda sizes: Nets(sizes[0], tuple(sizes[1:-1]), sizes[-1]),
        cases=MANY,
        cuda_cases=MANY,
    ),
}


def parse_all(suite: str, texts: Iterable[str]) -> list[Case]:
    """Parses the texts; `sweep` expands to the suite's sweep. Raises like parse."""
    found: list[Case] = []
    for text in texts:
        sweep = SUITES[suite].sweep if text == "sweep" else ()
        found += sweep or [parse(suite, text)]
    return found


def parse(suite: str, text: str) -> Case:
    """Parses a case of this suite; the inverse of str().

    Raises ValueError for another form, or a size that is not from 1 to LARGEST.
    """
    form, pattern, make = SUITES[suite].form, SUITES[suite].pattern, SUITES[suite].make
    sizes = [int(s) for s in re.findall("[0-9]+", text)] if re.fullmatch(pattern, text) else []
    if not sizes or max(sizes) > LARGEST:
        raise ValueError(f"a case of {suite} must be {form}, got '{text}'")
    return make(sizes)
