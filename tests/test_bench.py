"""The benchmarks: what they run, how they count, what they write. Nothing here asserts a time."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypotheses import given, st
from torch import Tensor
from torch.nn import functional as F

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench import machine, plot, runner
from mlp_ext.bench.cases import FLOATS, LARGEST, SUITES, Layer, Net, Setting, parse, parse_all
from mlp_ext.bench.compiled_step import compiled_step
from mlp_ext.bench.machine import Peak
from mlp_ext.bench.providers import PROVIDERS, Provider
from mlp_ext.bench.rows import (
    COLUMNS,
    Row,
    as_time,
    by_provider,
    geometric_mean,
    read_csv,
    write_csv,
)
from mlp_ext.bench.training import OPTIMIZERS, make_mlp, sgd_step
from mlp_ext.bench.work import Work, set_up
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
TINY = {"layers": "10x10x5", "train": "10-5-1@10"}
FULL = Setting("layers", "full")
STEP = Setting("train", "step", optimizer="sgd")
SETTINGS = [*(Setting("layers", mode) for mode in SUITES["layers"].modes), STEP]


def run(args: str, *files: str) -> int:
    return main(["bench", "--threads", "1", "--rounds", "3", *args.split(), *files])


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 1e-4)


@pytest.fixture
def stub_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of 2 GFLOP/s on each thread."""
    monkeypatch.setattr(_C, "peak_flops", lambda seconds, threads: 2e9 * threads, raising=False)
    monkeypatch.setattr(machine, "COPIED_BYTES", 2**16)


# --- Cases ---

sizes = st.integers(1, LARGEST)


@given(st.builds(Layer, sizes, sizes, sizes))
def test_layer_is_read_as_it_is_written(case: Layer) -> None:
    assert parse("layers", str(case)) == case
    assert str(case) == "x".join(map(str, case))


@given(st.lists(sizes, min_size=2, max_size=6), sizes)
def test_net_is_read_as_it_is_written(widths: list[int], batch: int) -> None:
    assert parse("train", str(Net(tuple(widths), batch))) == Net(tuple(widths), batch)


@given(st.sampled_from([*SUITES]), st.text("0123456789x-@ +_.\n٣", max_size=12))
def test_any_text_is_a_case_or_an_error(suite: str, text: str) -> None:
    try:
        assert str(parse(suite, text)) == text
    except ValueError as error:
        assert f"a case of {suite} must be {SUITES[suite].form}, got '{text}'" == str(error)


MALFORMED = [
    ("layers", "64x784"),
    ("layers", "64x784x256x1"),
    ("layers", "0x784x256"),
    ("layers", "-1x784x256"),
    ("layers", "64x784x"),
    ("layers", "64*784*256"),
    ("layers", "1x1x2147483648"),
    ("layers", "10-5-1@10"),
    ("train", "10-5-1"),
    ("train", "10@10"),
    ("train", "10-5-1@0"),
    ("train", "10-5-1@10@10"),
    ("train", "64x784x256"),
]


@pytest.mark.parametrize(("suite", "text"), MALFORMED)
def test_malformed_case_is_an_error(suite: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"a case of {suite} must be "):
        parse(suite, text)


def test_operations_are_those_of_the_products() -> None:
    layer, net = Layer(2, 3, 5), Net((3, 5, 7), 2)
    assert [layer.operations(mode) for mode in ("forward", "backward", "full")] == [60, 120, 180]
    # Forward 3x5 and 5x7, dW the same, dx of the second layer alone.
    assert net.operations("step") == 2 * 2 * (3 * 5 * 2 + 5 * 7 * 3)


# --- The runner, on a clock that the calls move ---


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Work:
        def prepare(turn: int) -> Callable[[], Tensor]:
            def call() -> Tensor:
                self.calls.append(name)
                self.now += seconds(turn)
                return torch.zeros(())

            return call

        return Work(prepare, dict)


def measured(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    clock = FakeTime()
    works = {name: clock.work(name, s.__getitem__) for name, s in seconds.items()}
    return runner.in_turn(works, len(seconds["native"]), clock)


def test_providers_run_in_turn_and_each_is_first() -> None:
    clock = FakeTime()
    works = {name: clock.work(name, lambda turn: 1.0) for name in "ABC"}
    rounds = []
    runner.in_turn(works, 4, clock, lambda: rounds.append(len(clock.calls)))
    assert "".join(clock.calls) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"  # warm-up first
    assert rounds == [6, 9, 12, 15]


def test_short_calls_are_repeated_to_fill_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 0.02)
    clock = FakeTime()
    works = {
        "native": clock.work("native", lambda turn: 0.03),
        "fused": clock.work("fused", lambda turn: 0.003),
    }
    seconds = runner.in_turn(works, 1, clock)
    assert seconds["native"] == pytest.approx([0.03])
    assert seconds["fused"] == pytest.approx([0.003])
    assert clock.calls.count("native") == 1 + 1
    assert clock.calls.count("fused") == (1 + 2 + 4 + 8) + 8


def test_time_of_a_call_is_divided_by_its_steps() -> None:
    clock = FakeTime()
    one = clock.work("native", lambda turn: 0.03)
    works = {"native": one, "fit": one._replace(steps=10)}
    assert runner.in_turn(works, 2, clock) == {
        "native": pytest.approx([0.03] * 2),
        "fit": pytest.approx([0.003] * 2),
    }


def test_fit_makes_as_many_steps_as_it_is_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fit(*parts: object) -> Callable[..., Tensor]:
        return lambda x, y, epochs=1: asked.append(epochs) or torch.zeros(())

    for case in (Net((10, 5, 1), 10), Net((64, 64), 4096), Net((1024, 1024, 1024), 4096)):
        work = set_up(case, STEP)(Provider(fit, has_epochs=True))
        work.prepare(0)()
        work.results()
        assert asked == [work.steps, 1]
        assert 4 <= work.steps <= 1000
        asked.clear()


def rows_of(seconds: dict[str, list[float]], **options: object) -> dict[str, Row]:
    rows = runner._rows(Layer(10, 10, 5), replace(FULL, **options), measured(seconds), Peak(2e3, 1))
    return {row.provider: row for row in rows}


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    rows = rows_of({"native": [1, 10, 2], "fused": [1, 4, 4]})
    assert rows["fused"].ratio_to_native == 1.0  # of 1, 2.5 and 0.5; that of the medians is 0.5
    assert rows["native"].ratio_to_native == 1.0


def test_row_has_median_quantiles_and_share_of_peak() -> None:
    row = rows_of({"native": [6, 1, 2, 5, 4, 3]})["native"]
    assert (row.q20_s, row.median_s, row.q80_s) == (2.0, 3.5, 5.0)
    assert row.gflops == pytest.approx(3000 / 3.5 / 1e9, rel=1e-5)
    assert row.share_of_peak == pytest.approx(3000 / 3.5 / 2e3, rel=1e-5)


def test_one_round_is_its_own_quantiles() -> None:
    row = rows_of({"native": [2], "fused": [1]})["fused"]
    assert (row.q20_s, row.median_s, row.q80_s, row.ratio_to_native) == (1, 1, 1, 2)


def test_peak_in_float32_says_nothing_of_other_dtypes() -> None:
    assert rows_of({"native": [1]}, dtype="bfloat16")["native"].share_of_peak is None


def test_share_of_a_gpus_peak_is_that_of_the_limit_that_binds() -> None:
    setting = replace(FULL, device="cuda", dtype="tf32")
    case = Layer(10, 10, 5)
    share = runner._share_of_peak
    assert share(case, setting, 2, Peak(3000, 1e9)) == pytest.approx(0.5)
    moved = 3 * (100 + 50 + 50) * 4  # x, W and y: once forward, twice backward
    assert share(case, setting, 2, Peak(1e9, moved)) == pytest.approx(0.5)
    assert share(case, setting, 2, None) is None


def test_torch_is_set_for_a_case_and_set_back() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with machine.torch_set(replace(FULL, threads=3, dtype="tf32")):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "high")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2, 8]) == pytest.approx(2)


def test_threads_are_as_before_after_a_measurement() -> None:
    runner.measure(Layer(2, 3, 4), replace(FULL, threads=3), ["native"], 1)
    assert torch.get_num_threads() == 1


# --- The providers ---


def applicable(setting: Setting) -> Iterator[tuple[str, Provider]]:
    for name, provider in PROVIDERS[setting.suite].items():
        if not provider.obstacle(setting) and not name.startswith("compile"):
            yield name, provider


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", mlp_ext.ACTIVATIONS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.suite}-{s.mode}")
def test_every_provider_computes_what_native_does(
    setting: Setting, activation: str, dtype: str
) -> None:
    setting = replace(setting, activation=activation, dtype=dtype)
    case = parse(setting.suite, TINY[setting.suite])
    start = set_up(case, setting)
    runner.check({name: start(p) for name, p in applicable(setting)}, case, setting)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_provider_steps_as_native_does(optimizer: str) -> None:
    setting = replace(STEP, optimizer=optimizer, dtype="float64")
    case = Net((10, 5, 1), 10)
    start = set_up(case, setting)
    works = {name: start(provider) for name, provider in applicable(setting)}
    runner.check(works, case, setting)
    for turn in range(3):
        for work in works.values():
            work.prepare(turn)()
    assert ("native_fused" in works) is (optimizer != "rmsprop")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_compiled_step_updates_as_the_optimizer(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)

    def trained(make: Callable[..., Callable[..., Tensor]]) -> list[Tensor]:
        model = make_mlp([4, 3, 2]).double()
        options = OPTIMIZERS[optimizer](model.parameters(), lr=0.05)
        step = make(model, torch.nn.MSELoss(), options)
        losses = [step(x, y).detach() for _ in range(5)]
        return [torch.stack(losses), *model.state_dict().values()]

    torch.testing.assert_close(trained(compiled_step), trained(sgd_step))


def test_forward_has_its_peers_and_relu_its_own() -> None:
    names = {
        mode: {n for n, _ in applicable(Setting("layers", mode))} for mode in ("forward", "full")
    }
    assert names["full"] == {"native", "native_inplace", "fused"}
    assert "mkldnn" not in dict(applicable(Setting("layers", "forward", "softplus")))
    assert names["forward"] - {"mkldnn"} == names["full"]
    assert "native_inplace" not in dict(applicable(replace(FULL, activation="tanh")))
    assert "mkldnn" not in dict(applicable(Setting("layers", "forward", dtype="float64")))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.suite}-{s.mode}")
def test_call_can_be_repeated_and_leaves_fresh_gradients(setting: Setting) -> None:
    work = set_up(parse(setting.suite, TINY[setting.suite]), setting)(
        PROVIDERS[setting.suite]["fused"]
    )
    first, second = work.results(), work.results()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for turn in range(6):
        call = work.prepare(turn)
        call()
        call()


def test_layer_gradients_are_of_every_operand_where_the_mode_has_any() -> None:
    def names(mode: str) -> set[str]:
        setting = Setting("layers", mode)
        return {*set_up(Layer(4, 3, 2), setting)(PROVIDERS["layers"]["native"]).results()}

    gradients = {f"gradient of {name}" for name in ("input", "weight", "bias")}
    assert names("forward") == {"output"}
    assert names("full") == names("backward") == {"output", *gradients}


WRONG = {
    "half": lambda x, w, b: torch.relu(F.linear(x, w, b)) * 0.5,
    "last column": lambda x, w, b: (
        torch.relu(F.linear(x, w, b)) * torch.arange(4, -1, -1).clamp(max=1)
    ),
    "nan": lambda x, w, b: torch.relu(F.linear(x, w, b)) * torch.nan,
    "shape": lambda x, w, b: torch.relu(F.linear(x, w, b)).T,
    "bias left out": lambda x, w, b: torch.relu(F.linear(x, w)),
    "raises": lambda x, w, b: torch.relu(F.linear(w, x, b)),
}


@pytest.mark.parametrize("mode", SUITES["layers"].modes)
@pytest.mark.parametrize("fault", WRONG)
def test_wrong_provider_is_caught(
    fault: str, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROVIDERS["layers"], "wrong", Provider(lambda setting: WRONG[fault]))
    assert run(f"--mode {mode} --cases 10x10x5 --providers wrong,fused") == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        f"mlp-ext bench: error: wrong (is wrong|fails) in {mode} relu float32 10x10x5: .+\n", err
    )


def test_wrong_update_is_caught(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice_the_rate(model: object, criterion: object, optimizer: torch.optim.SGD) -> object:
        step = PROVIDERS["train"]["native"].make(model, criterion, optimizer)

        def wrong(input: Tensor, target: Tensor) -> Tensor:
            loss = step(input, target)
            optimizer.step()
            return loss

        return wrong

    monkeypatch.setitem(PROVIDERS["train"], "wrong", Provider(twice_the_rate))
    assert run("--suite train --cases 10-5-1@10 --providers wrong") == 1
    assert (
        "wrong is wrong in step relu sgd float32 10-5-1@10: its change" in capsys.readouterr().err
    )


@pytest.mark.skipif(
    bool(PROVIDERS["layers"]["compile"].obstacle(FULL)), reason="torch.compile has no compiler"
)
def test_compiled_backward_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--mode backward --cases 10x10x5 --providers compile") == 0
    told = capsys.readouterr()
    assert "compile" in told.out
    assert "mlp-ext bench" not in told.err  # torch may warn there


@pytest.mark.skipif(
    bool(PROVIDERS["train"]["compile-step"].obstacle(STEP)),
    reason="torch.compile has no compiler",
)
def test_compiled_step_is_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--suite train --cases 10-5-1@10 --providers compile-step,step,fit") == 0
    assert capsys.readouterr().err == ""


# --- The command ---


def test_rows_are_the_same_in_csv_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stub_peak: None
) -> None:
    files = [str(tmp_path / "rows.csv"), str(tmp_path / "rows.json")]
    args = "--cases 10x10x5,4x3x2 --providers fused --activation sigmoid --peak"
    assert run(args, "--csv", files[0], "--json", files[1]) == 0
    rows = read_csv(tmp_path / "rows.csv")
    assert [asdict(row) for row in rows] == json.loads((tmp_path / "rows.json").read_text())
    assert [(row.case, row.provider) for row in rows] == [
        (case, provider) for case in ("10x10x5", "4x3x2") for provider in ("native", "fused")
    ]
    for row in rows:
        assert (row.suite, row.mode) == ("layers", "full")
        assert (row.activation, row.dtype, row.device) == ("sigmoid", "float32", "cpu")
        assert row.device_name == machine.device_name("cpu")
        assert row.threads == 1
        assert 0 < row.q20_s <= row.median_s <= row.q80_s
        assert row.ratio_to_native > 0
        assert (row.torch, row.mlp_ext) == (torch.__version__, mlp_ext.__version__)
        assert row.commit == machine.commit()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.timestamp)
        assert row.share_of_peak == pytest.approx(row.gflops / 2, rel=1e-4)
    assert (tmp_path / "rows.csv").read_text().startswith(",".join(COLUMNS) + "\nlayers,10x10x5,")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "rows.json"}


API_COLUMNS = (
    "suite, case, mode, activation, optimizer, dtype, device, device_name, threads, provider, "
    "median_s, q20_s, q80_s, ratio_to_native, torch, mlp_ext, commit, timestamp"
)


def test_columns_are_those_promised() -> None:
    assert [*API_COLUMNS.split(", "), "gflops", "share_of_peak"] == COLUMNS


def test_table_has_a_line_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--suite train --cases 10-5-1@10,3-2@4 --providers fused") == 0
    out, err = capsys.readouterr()
    title, _, heading, *lines = out.splitlines()
    assert title == f"train step relu sgd float32 on {machine.device_name('cpu')}, 1 thread"
    assert heading.split() == ["native", "fused"]
    number, ratio = r"\d[\d.e+]* [mun]?s", r"\d+\.\d\dx"
    for case, line in zip(("10-5-1@10", "3-2@4"), lines, strict=False):
        assert re.fullmatch(f"{case} +{number} +{number} +{ratio}", line)
    assert re.fullmatch(f"geometric mean +{ratio}", lines[2])
    assert re.fullmatch(f"minimum +{ratio}", lines[3])
    assert re.fullmatch(r" +at +(10-5-1@10|3-2@4)", lines[4])
    assert len({len(line) for line in (heading, *lines)}) == 1
    assert err == ""


def test_native_is_always_there_and_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    args = "--mode forward --cases 4x3x2,4x3x2 --providers fused,native,fused"
    assert run(args, "--csv", str(path)) == 0
    assert [row.provider for row in read_csv(path)] == ["native", "fused"]


def test_what_does_not_apply_is_left_out_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(
            "--cases 4x3x2 --activation tanh --providers "
            "mkldnn,native_inplace,fused-cudagraph,addmm_activation"
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        "mlp-ext bench: mkldnn is left out: forward on the CPU only",
        "mlp-ext bench: native_inplace is left out: for relu only",
        "mlp-ext bench: fused-cudagraph is left out: on cuda only",
        "mlp-ext bench: addmm_activation is left out: on cuda only",
    ]
    assert out.splitlines()[2].split() == ["native"]


def test_a_case_that_a_provider_does_not_take_is_no_row_of_its(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = PROVIDERS["layers"]
    narrow = table["fused"]._replace(takes=lambda case, setting: case == Layer(4, 3, 2))
    monkeypatch.setitem(table, "narrow", narrow)
    path = tmp_path / "rows.csv"
    args = "--mode forward --cases 5x3x2,4x3x2 --providers narrow,fused"
    assert run(args, "--csv", str(path)) == 0
    found = [(row.case, row.provider) for row in read_csv(path)]
    assert found == [
        ("5x3x2", "native"),
        ("5x3x2", "fused"),
        *(("4x3x2", provider) for provider in ("native", "narrow", "fused")),
    ]
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert "-" in lines["5x3x2"].split()
    assert "-" not in lines["4x3x2"].split()
    ratios = {row.provider: row.ratio_to_native for row in read_csv(path) if row.case == "4x3x2"}
    assert lines["geometric"].split()[2] == f"{ratios['narrow']:.2f}x"


def test_published_cases_are_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for suite, case in TINY.items():
        tiny = SUITES[suite]._replace(cases=(parse(suite, case),))
        monkeypatch.setitem(SUITES, suite, tiny)
        path = tmp_path / f"{suite}.csv"
        assert run(f"--suite {suite} --providers fused", "--csv", str(path)) == 0
        assert {row.case for row in read_csv(path)} == {case}


def test_sweep_stands_for_shapes_of_all_sorts() -> None:
    cases = parse_all("layers", ["10x10x5", "sweep"])
    assert cases[0] == Layer(10, 10, 5)
    assert len(set(cases[1:])) == len(cases) - 1 >= 60
    for size in range(3):
        assert min(case[size] for case in cases) == 1
    assert max(case[0] for case in cases) == 65536
    assert max(case[1] for case in cases) == max(case[2] for case in cases) == 4096


def test_peak_alone_measures_only_the_peak(
    stub_peak: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "measure", pytest.fail)
    assert main(["bench", "--peak", "--threads", "2"]) == 0
    number = r"[\d.]+"
    pattern = f"peak with 2 threads of .+: 4.0 GFLOP/s float32, copy {number} GB/s\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


def test_share_of_peak_is_printed(stub_peak: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--peak --cases 10x10x5 --providers fused") == 0
    peak, _, legend, _, line, *_ = capsys.readouterr().out.splitlines()
    assert peak.startswith("peak with 1 thread of ")
    assert legend.endswith(", share of peak")
    assert line.count("%") == 2


ERRORS = [
    ("--suite kernels", "argument --suite: must be one of "),
    ("--mode sideways", "argument --mode: must be one of "),
    ("--mode step", "argument --mode: layers has full, forward, backward, got 'step'"),
    ("--suite train --mode full", "argument --mode: train has step, got 'full'"),
    ("--cases 64x784", "argument --cases: a case of layers must be MxKxN, as 64x784x256, got"),
    ("--cases 10x10x5,", "argument --cases: a case of layers must be MxKxN"),
    ("--cases 0x1x1", "argument --cases: a case of layers must be MxKxN"),
    ("--suite train --cases 10x10x5", "argument --cases: a case of train must be WIDTHS@BATCH"),
    ("--suite train --cases sweep", "argument --cases: a case of train must be WIDTHS@BATCH"),
    (
        "--cases 1x2147483647x2147483647",
        "argument --cases: 1x2147483647x2147483647: ",
    ),  # 2e19 bytes
    ("--providers jax", "argument --providers: layers has native, native_inplace, compile, "),
    ("--providers fused,", "argument --providers: layers has "),
    ("--suite train --providers mkldnn", "argument --providers: train has native, native_fused, "),
    ("--activation swish", "argument --activation: must be one of "),
    ("--suite train --optimizer lion", "argument --optimizer: must be one of "),
    ("--optimizer adam", "argument --optimizer: layers has none, use --suite train"),
    ("--dtype int8", "argument --dtype: must be one of "),
    ("--dtype tf32", "argument --dtype: tf32 is for --device cuda"),
    ("--device tpu", "argument --device: must be one of "),
    ("--threads 0", "argument --threads: must be a whole number from 1 to 2147483647, got '0'"),
    ("--rounds 0", "argument --rounds: must be a whole number from 1 to 2147483647, got '0'"),
    ("--csv missing/rows.csv", "argument --csv: cannot write 'missing/rows.csv': No such file"),
    ("--json missing/rows.json", "argument --json: cannot write 'missing/rows.json': No such"),
    ("--csv .", "argument --csv: '.' is not a file"),
    ("--plot bars.xyz", "argument --plot: the file must end in one of "),
    ("--plot bars.png --providers native", "argument --plot: nothing to draw"),
    ("extra", "unrecognized arguments: extra"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[args for args, _ in ERRORS])
def test_error_is_one_line_before_anything_is_timed(
    args: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--plot" in args:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "in_turn", pytest.fail)
    assert main(["bench", *args.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"mlp-ext bench: error: {message}")
    assert err.count("\n") == 1
    assert (out == "") is ("x2147483647" not in args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", ["--device cuda", "--device cuda --peak"])
def test_absent_cuda_is_an_error(
    args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *args.split()]) == 2
    message = "mlp-ext bench: error: argument --device: torch finds no cuda device here\n"
    assert capsys.readouterr() == ("", message)


def test_missing_matplotlib_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["bench", "--plot", str(tmp_path / "bars.png")]) == 2
    advice = 'matplotlib is not installed; try: pip install "mlp_ext[demo]"'
    assert capsys.readouterr() == ("", f"mlp-ext bench: error: {advice}\n")


def test_interrupted_run_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(setting: Setting) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(PROVIDERS["layers"], "fused", Provider(interrupted))
    path = tmp_path / "rows.csv"
    path.write_text("before")
    assert run("--cases 4x3x2 --providers fused", "--csv", str(path)) == 130
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("--cases 4x3x2,5x3x2 --providers fused") == 0
    assert "/6 [" in terminal.getvalue()
    assert "4x3x2" in terminal.getvalue()


def test_help_tells_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    options = (
        "suite mode cases providers activation optimizer dtype device threads rounds json csv plot"
    )
    assert all(f"--{option} " in out for option in options.split())
    assert "%%" not in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (3.14e-3, "3.14 ms"), (1e-6, "1 us"), (3.5e-7, "350 ns")]
)
def test_time_has_a_unit(seconds: float, text: str) -> None:
    assert as_time(seconds) == text


# --- Where it was measured ---


def test_device_name_has_the_instruction_set() -> None:
    names = {"avx512": "AVX-512", "avx2": "AVX2", "generic": "generic"}
    assert machine.device_name("cpu").endswith(f" ({names[_C.instruction_set()]})")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A package under git, committed."""
    package = tmp_path / "mlp_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=name", "-c", "user.email=name@example.org"]
    for args in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    return tmp_path


def test_commit_has_a_plus_where_a_source_has_changed(repository: Path) -> None:
    package = repository / "mlp_ext"
    clean = machine.commit.__wrapped__(package)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (repository / "results.csv").write_text("no source")
    assert machine.commit.__wrapped__(package) == clean
    (package / "__init__.py").write_text("changed")
    assert machine.commit.__wrapped__(package) == clean + "+"


def test_commit_is_unknown_where_the_package_is_not_under_git(repository: Path) -> None:
    for installed in (repository / ".venv" / "mlp_ext", repository.parent):
        installed.mkdir(parents=True, exist_ok=True)
        assert machine.commit.__wrapped__(installed) == "unknown"


# --- Pictures and files ---


@pytest.fixture
def rows() -> list[Row]:
    first = Row(
        **asdict(FULL),
        case="10x10x5",
        device_name="Processor (AVX2)",
        provider="native",
        median_s=1e-3,
        q20_s=9e-4,
        q80_s=2e-3,
        ratio_to_native=1.0,
        torch="2.13.0",
        mlp_ext="0.1.0",
        commit="abcdef0+",
        timestamp="2026-01-01T00:00:00+00:00",
        gflops=3e-3,
        share_of_peak=None,
    )
    fused = replace(first, provider="fused", ratio_to_native=2.0, share_of_peak=0.25)
    other = replace(fused, case="4x3x2", ratio_to_native=0.5)
    return [first, fused, replace(fused, provider="another", ratio_to_native=1.5), other]


def test_csv_is_read_as_it_was_written(rows: list[Row], tmp_path: Path) -> None:
    write_csv(rows, tmp_path / "rows.csv")
    assert read_csv(tmp_path / "rows.csv") == rows


def test_csv_of_before_the_column_optimizer_is_read(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for suite, optimizer in (("layers", ""), ("train", "sgd")):
        expected = [replace(row, suite=suite, optimizer=optimizer) for row in rows]
        write_csv(expected, path)
        head, *lines = [line.split(",") for line in path.read_text().splitlines()]
        column = head.index("optimizer")
        older = [",".join(cells[:column] + cells[column + 1 :]) for cells in (head, *lines)]
        path.write_text("\n".join(older) + "\n")
        assert read_csv(path) == expected


def test_bars_are_the_ratios_by_provider(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plot.ratio_bars(rows).axes
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert bars == {"fused, geometric mean 1.00": [2.0, 0.5], "another, geometric mean 1.50": [1.5]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["10x10x5", "4x3x2"]
    assert {"2.00  (25% of peak)", "0.50  (25% of peak)"} <= {t.get_text() for t in axes.texts}
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 1]]
    for part in ("Processor (AVX2)", "1 thread", "float32", "full", "relu"):
        assert part in axes.get_title()
    colours = {bars.patches[0].get_facecolor() for bars in axes.containers}
    assert len(colours) == len(by_provider(rows)) == 2


def test_each_setting_has_a_panel(rows: list[Row]) -> None:
    pytest.importorskip("matplotlib")
    sigmoid = [replace(row, activation="sigmoid") for row in rows]
    assert len(plot.ratio_bars(rows + sigmoid).axes) == 2


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.png"
    assert run("--cases 4x3x2 --providers fused", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


def test_plot_is_drawn_again_from_files(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second, picture = (tmp_path / name for name in ("a.csv", "b.csv", "bars.svg"))
    write_csv(rows, first)
    write_csv([replace(row, threads=2) for row in rows], second)
    plot.main([str(first), str(second), str(picture)])
    assert picture.read_text().count("2 threads") == 1


@pytest.mark.parametrize(
    ("content", "picture", "message"),
    [
        (None, "bars.png", "[Errno 2] No such file or directory: 'rows.csv'"),
        ("a,b\n1,2\n", "bars.png", "rows.csv does not have the columns suite, case, "),
        (",".join(COLUMNS) + "\n", "bars.png", "nothing to draw: no provider besides native"),
        (",".join(COLUMNS) + "\nlayers,1x1x1\n", "bars.png", "rows.csv, line 2: "),
        ("", "bars.xyz", "argument picture: the file must end in one of "),
        ("", "missing/bars.png", "argument picture: cannot write 'missing/bars.png': No such"),
    ],
)
def test_drawing_again_has_errors_of_one_line(
    content: str | None,
    picture: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("rows.csv").write_text(content)
    with pytest.raises(SystemExit) as stop:
        plot.main(["rows.csv", picture])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"python -m mlp_ext.bench.plot: error: {message}")
    assert err.count("\n") == 1


def test_benchmarks_run_under_their_names() -> None:
    pytest.importorskip("pytest_benchmark")
    options = ["--benchmark-only", "--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "-v"]
    chosen = ["-k", "fused and relu and not native_fused and (10x10x5 or 10-5-1)"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "benchmarks/"]
    env = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, *options, *chosen], capture_output=True, text=True, cwd=ROOT, env=env
    )
    out = result.stdout
    for name in ("forward", "backward", "full"):
        assert f"bench_{name}[fused-relu-10x10x5-float32]" in out
    assert "bench_step[fused-relu-10-5-1@10-float32]" in out
    assert re.search(r" 4 passed, \d+ deselected", out), out
