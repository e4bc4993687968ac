"""What the benchmarks share: a case, checked against native and then timed by pytest-benchmark."""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from mlp_ext.bench.cases import SUITES, Case, Setting
from mlp_ext.bench.machine import device_name
from mlp_ext.bench.providers import PROVIDERS
from mlp_ext.bench.runner import check
from mlp_ext.bench.work import set_up

LEFT_OUT = ("compile-max-autotune",)  # minutes for a case
ON_CUDA = ("cudagraph", "fused-cudagraph", "addmm_activation")
ACTIVATIONS = ("relu", "sigmoid")
DTYPES = ("float32",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """bench_<mode>[provider-activation-shape-dtype] over the published cases of a suite."""
    suite = metafunc.module.SUITE
    providers = [name for name in PROVIDERS[suite] if name not in LEFT_OUT + ON_CUDA]
    table = list(product(providers, ACTIVATIONS, SUITES[suite].cases, DTYPES))
    ids = ["-".join(map(str, row)) for row in table]
    metafunc.parametrize(("provider", "activation", "case", "dtype"), table, ids=ids)


@pytest.fixture
def timed(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    provider: str,
    activation: str,
    case: Case,
    dtype: str,
) -> Iterator[Callable[[str], None]]:
    """Times the provider in the mode that it is called with."""
    suite = request.module.SUITE

    def run(mode: str) -> None:
        optimizer, threads = SUITES[suite].optimizer, torch.get_num_threads()
        setting = Setting(suite, mode, activation, optimizer, dtype, threads=threads)
        if obstacle := PROVIDERS[suite][provider].obstacle(setting):
            pytest.skip(f"{provider}: {obstacle}")
        start = set_up(case, setting)
        names = dict.fromkeys(["native", provider])
        works = {name: start(PROVIDERS[suite][name]) for name in names}
        check(works, case, setting)
        benchmark.group = f"{suite} {mode} {activation} {case} {dtype}"
        benchmark.extra_info.update(threads=setting.threads, device_name=device_name("cpu"))
        benchmark.extra_info["steps"] = works[provider].steps
        benchmark(works[provider].prepare(0))

    yield run
    torch.compiler.reset()
