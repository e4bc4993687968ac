"""What the tests of `mlp-ext bench` share: the command, quick, and a row."""

from __future__ import annotations

from mlp_ext.bench.cases import Setting
from mlp_ext.bench.rows import Row
from mlp_ext_cli import main

FULL = Setting("layers", "full")
TINY = {"layers": "10x10x5", "train": "10-5-1@10", "many": "3x10-5-1@10"}
ROW = Row(
    suite="layers",
    case="10x10x5",
    mode="full",
    activation="relu",
    optimizer="",
    dtype="float32",
    device="cpu",
    device_name="Processor (AVX2)",
    threads=1,
    provider="fused",
    median_s=1e-3,
    q20_s=9e-4,
    q80_s=2e-3,
    ratio_to_native=2.0,
    ratio_q20=1.8,
    ratio_q80=2.1,
    torch="2.13.0",
    mlp_ext="0.1.0",
    commit="abcdef0+",
    timestamp="2026-01-01T00:00:00+00:00",
    gflops=3e-3,
    bound="compute",
    share_of_bound=0.25,
    path="small",
    other_cpus=0.0,
)


def run(args: str, *files: str) -> int:
    return main(["bench", "--threads", "1", "--rounds", "3", *args.split(), *files])
