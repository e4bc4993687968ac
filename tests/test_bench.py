"""The benchmarks: what they run and how they count. Nothing here asserts a time."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from benching import FULL, TINY, run
from hypotheses import given, st
from torch import Tensor
from torch.nn import functional as F

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench import machine, runner
from mlp_ext.bench.cases import FLOATS, LARGEST, SUITES, Case, Layer, Net, Nets, Setting, parse
from mlp_ext.bench.compiled_step import compiled_step
from mlp_ext.bench.machine import Peak
from mlp_ext.bench.providers import PATHS, PROVIDERS, Provider, path
from mlp_ext.bench.rows import Row, geometric_mean
from mlp_ext.bench.training import OPTIMIZERS, make_mlp, sgd_step
from mlp_ext.bench.work import Work, set_up

pytestmark = pytest.mark.usefixtures("one_thread")

STEP = Setting("train", "step", optimizer="sgd")
MANY = Setting("many", "step", optimizer="sgd")
SETTINGS = [*(Setting("layers", mode) for mode in SUITES["layers"].modes), STEP, MANY]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 1e-4)


# --- Cases ---

sizes = st.integers(1, LARGEST)


@given(st.builds(Layer, sizes, sizes, sizes))
def test_layer_is_read_as_it_is_written(case: Layer) -> None:
    assert parse("layers", str(case)) == case
    assert str(case) == "x".join(map(str, case))


@given(st.lists(sizes, min_size=2, max_size=6), sizes)
def test_net_is_read_as_it_is_written(widths: list[int], batch: int) -> None:
    assert parse("train", str(Net(tuple(widths), batch))) == Net(tuple(widths), batch)


@given(sizes, st.lists(sizes, min_size=2, max_size=6), sizes)
def test_nets_are_read_as_they_are_written(networks: int, widths: list[int], batch: int) -> None:
    case = Nets(networks, tuple(widths), batch)
    assert parse("many", str(case)) == case
    assert str(case) == f"{networks}x{case.net}"


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
    ("train", "3x10-5-1@10"),
    ("many", "10-5-1@10"),
    ("many", "0x10-5-1@10"),
    ("many", "3x10@10"),
    ("many", "3x4x10-5-1@10"),
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
    assert Nets(10, *net).operations("step") == 10 * net.operations("step")


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


@pytest.mark.slow
def test_fit_makes_as_many_steps_as_it_is_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fit(*parts: object) -> Callable[..., Tensor]:
        return lambda x, y, epochs=1: asked.append(epochs) or torch.zeros(())

    cases = (Net((10, 5, 1), 10), Net((64, 64), 4096), Net((1024, 1024, 1024), 4096))
    many = (Nets(3, (10, 5, 1), 10), Nets(1000, (3, 2), 4))
    for case in (*cases, *many):
        networks = case.networks if isinstance(case, Nets) else 1
        work = set_up(case, MANY if case in many else STEP)(Provider(fit, has_epochs=True))
        work.prepare(0)()
        work.results()
        assert asked == [work.steps / networks, 1]
        assert 4 <= asked[0] <= min(1000, 1e6 / networks)
        asked.clear()


PEAK = Peak(2e3, {8: 1.0, 1 << 20: 0.5}, 0.5)


def rows_of(seconds: dict[str, list[float]], peak: Peak | None = PEAK) -> dict[str, Row]:
    paths = dict.fromkeys(seconds, "")
    settings = dict.fromkeys(seconds, FULL)
    rows = runner._rows(Layer(10, 10, 5), settings, measured(seconds), peak, paths, 0.12)
    return {row.provider: row for row in rows}


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    rows = rows_of({"native": [1, 10, 2], "fused": [1, 4, 4]})
    assert rows["fused"].ratio_to_native == 1.0  # of 1, 2.5 and 0.5; that of the medians is 0.5
    assert rows["native"].ratio_to_native == 1.0


def test_row_has_quantiles_of_time_and_of_the_ratio() -> None:
    rows = rows_of({"native": [6, 1, 2, 5, 4, 3], "fused": [1] * 6})
    row = rows["native"]
    assert (row.q20_s, row.median_s, row.q80_s) == (2.0, 3.5, 5.0)
    assert (row.ratio_q20, row.ratio_to_native, row.ratio_q80) == (1, 1, 1)
    assert (rows["fused"].ratio_q20, rows["fused"].ratio_q80) == (2.0, 5.0)
    assert row.gflops == pytest.approx(3000 / 3.5 / 1e9, rel=1e-5)
    assert row.other_cpus == 0.12


def test_one_round_is_its_own_quantiles() -> None:
    row = rows_of({"native": [2], "fused": [1]})["fused"]
    assert (row.q20_s, row.median_s, row.q80_s) == (1, 1, 1)
    assert (row.ratio_q20, row.ratio_to_native, row.ratio_q80) == (2, 2, 2)


@pytest.mark.parametrize(
    ("case", "dtype", "bound", "seconds"),
    [
        (Layer(100, 100, 100), "float32", "compute", 3 * 2e6 / 1e4),
        (Layer(10, 1, 10), "float32", "memory", 3 * (10 + 10 + 100) * 4 / 1e4),
        (Layer(10, 1, 10), "bfloat16", "memory", 3 * (10 + 10 + 100) * 2 / 1e4),
        (Layer(1000, 1, 1000), "float32", "memory", 3 * (1000 + 1000 + 1e6) * 4 / 1e3),
        (Layer(1, 1, 1), "float32", "latency", 0.02),
        (Net((3, 5, 7), 100), "float32", "compute", 200 * (3 * (15 + 35) - 15) / 1e4),
        # Per network: rows are read once for all of them, and a call steps them all.
        (Nets(9, (3, 5, 7), 100), "float32", "compute", 200 * (3 * (15 + 35) - 15) / 1e4),
        (Nets(9, (3, 5), 1), "bfloat16", "memory", (8 / 9 + 2 * 15) * 2 / 1e4),
        (Nets(10, (1, 1), 1), "float32", "latency", 0.002),
    ],
)
def test_bound_is_the_limit_that_takes_longest(
    case: Case, dtype: str, bound: str, seconds: float
) -> None:
    setting = replace(FULL if isinstance(case, Layer) else STEP, dtype=dtype)
    peak = Peak(1e4, {1 << 10: 1e4, 1 << 20: 1e3}, 0.02)  # a cache of less than 1 MiB
    assert peak.bound(case, setting) == (bound, pytest.approx(seconds))


def test_rows_have_the_bound_and_their_share_of_it() -> None:
    row = rows_of({"native": [3]})["native"]
    moved = 3 * (100 + 50 + 50) * 4  # x, W and y: once forward, twice backward
    assert (row.bound, row.share_of_bound) == ("memory", pytest.approx(moved / 3))
    row = rows_of({"native": [3]}, peak=None)["native"]
    assert (row.bound, row.share_of_bound) == ("", None)


def test_rows_of_many_networks_are_per_network() -> None:
    case, seconds = Nets(10, (3, 5), 2), measured({"native": [2.0]})
    (row,) = runner._rows(case, {"native": MANY}, seconds, PEAK, {"native": ""}, None)
    assert row.gflops == pytest.approx(2 * 2 * 15 * 2 / 2.0 / 1e9)
    assert row.share_of_bound == pytest.approx(PEAK.bound(case, MANY)[1] / 2.0)


@pytest.mark.usefixtures("zen4")
@pytest.mark.parametrize(
    ("setting", "case", "expected"),
    [
        (FULL, "64x784x256", {"fused": "dots/packed", "native": "", "compile": ""}),
        (replace(FULL, mode="forward"), "64x784x256", {"fused": "dots"}),
        (replace(FULL, mode="backward"), "64x784x256", {"fused": "packed"}),
        (FULL, "10x10x5", {"fused": "narrow/small"}),
        (STEP, "10-5-1@10", {"step": "blocks", "fit": "blocks", "stack": "", "native": ""}),
        (MANY, "3x10-5-1@10", {"step": "blocks", "fit": "blocks", "vmap": "", "native": ""}),
    ],
)
def test_path_is_that_of_the_plan(setting: Setting, case: str, expected: dict[str, str]) -> None:
    table = PROVIDERS[setting.suite]
    parsed = parse(setting.suite, case)
    assert {name: path(parsed, setting, table[name]) for name in expected} == expected


def test_path_of_steps_is_that_of_many_networks() -> None:
    steps = PROVIDERS["many"]["steps"]
    for case, dtype, size in (("3x10-5-1@10", "float32", 4), ("3x784-100-10@200", "float64", 8)):
        parsed = parse("many", case)
        expected = _C.many_plan([*parsed.widths], parsed.batch, size)
        assert path(parsed, replace(MANY, dtype=dtype), steps) == expected != ""


def test_torch_is_set_for_a_case_and_set_back() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with machine.torch_set(replace(FULL, threads=3, dtype="tf32")):
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (3, "high")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2, 8]) == pytest.approx(2)


def test_threads_are_as_before_after_a_measurement() -> None:
    native = {"native": PROVIDERS["layers"]["native"]}
    runner.measure(Layer(2, 3, 4), replace(FULL, threads=3), native, 1)
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


@pytest.mark.parametrize("suite", ["train", "many"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_provider_steps_as_native_does(optimizer: str, suite: str) -> None:
    setting = Setting(suite, "step", optimizer=optimizer, dtype="float64")
    case = parse(suite, TINY[suite])
    start = set_up(case, setting)
    works = {name: start(provider) for name, provider in applicable(setting)}
    runner.check(works, case, setting)
    for turn in range(3):
        for work in works.values():
            work.prepare(turn)()
    assert ("native_fused" in works) is (suite == "train" and optimizer != "rmsprop")


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


@pytest.mark.parametrize("provider", ["vmap", "bmm"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stacked_networks_train_as_each_alone(optimizer: str, provider: str) -> None:
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    criterion, losses, models = torch.nn.MSELoss(), {}, {}
    for name in ("native", provider):
        models[name] = [make_mlp([4, 3, 2], seed).double() for seed in range(3)]
        optimizers = [
            OPTIMIZERS[optimizer](model.parameters(), lr=lr)
            for model, lr in zip(models[name], (0.01, 0.02, 0.05), strict=True)
        ]
        step = PROVIDERS["many"][name].make(models[name], criterion, optimizers)
        losses[name] = [torch.stack([*step(x, y)]) for _ in range(5)]
    step.save()
    torch.testing.assert_close(losses[provider], losses["native"])
    for model, alone in zip(models[provider], models["native"], strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(alone.state_dict()))


def test_fewer_threads_are_measured_in_turn() -> None:
    names = ("native", "fused")
    providers = {name: PROVIDERS["layers"][name] for name in names}
    setting = replace(FULL, threads=2)
    rows = runner.measure(Layer(2, 3, 4), setting, providers, 1, fewer_threads=[1])
    found = {row.provider: row.threads for row in rows}
    assert found == {"native": 2, "fused": 2, "native@1": 1, "fused@1": 1}


def test_forward_has_its_peers_and_relu_its_own() -> None:
    names = {
        mode: {n for n, _ in applicable(Setting("layers", mode))} for mode in ("forward", "full")
    }
    assert names["full"] - {*PATHS["cpu"]} == {"native", "native_inplace", "fused"}
    assert "mkldnn" not in dict(applicable(Setting("layers", "forward", "softplus")))
    assert names["forward"] - {"mkldnn"} == names["full"]
    assert "native_inplace" not in dict(applicable(replace(FULL, activation="tanh")))
    assert "mkldnn" not in dict(applicable(Setting("layers", "forward", dtype="float64")))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.suite}-{s.mode}")
def test_call_can_be_repeated_and_leaves_fresh_gradients(setting: Setting) -> None:
    work = set_up(parse(setting.suite, TINY[setting.suite]), setting)(
        PROVIDERS[setting.suite]["step" if setting == MANY else "fused"]
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
    "nothing": lambda x, w, b: None,
}


def test_a_gradient_left_out_is_caught() -> None:
    frozen = Provider(lambda setting: lambda x, w, b: torch.relu(F.linear(x, w.detach(), b)))
    works = {
        name: set_up(Layer(4, 3, 2), FULL)(provider)
        for name, provider in (("native", PROVIDERS["layers"]["native"]), ("frozen", frozen))
    }
    with pytest.raises(runner.WrongResult, match=r"frozen is wrong in .*: its gradient of weight"):
        runner.check(works, Layer(4, 3, 2), FULL)


@pytest.mark.slow
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


def stopped(models: list, criterion: object, optimizers: list) -> object:
    """The last network does not learn."""
    optimizers[-1].step = lambda: None
    return PROVIDERS["many"]["native"].make(models, criterion, optimizers)


def one_rate(models: list, criterion: object, optimizers: list) -> object:
    """All networks have the learning rate of the first."""
    native = PROVIDERS["many"]["native"].make(models, criterion, optimizers)

    def step(input: Tensor, target: Tensor) -> list[Tensor]:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizers[0].param_groups[0]["lr"]
        return native(input, target)

    return step


def first_twice(models: list, criterion: object, optimizers: list) -> object:
    """The losses of the first stand for all."""
    native = PROVIDERS["many"]["native"].make(models, criterion, optimizers)
    return lambda input, target: [native(input, target)[0]] * len(models)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [(stopped, "change of the weights"), (one_rate, "change"), (first_twice, "loss")],
)
def test_wrong_network_among_many_is_caught(wrong: Callable[..., object], what: str) -> None:
    case = Nets(100, (10, 5, 1), 10)
    start = set_up(case, MANY)
    works = {"native": start(PROVIDERS["many"]["native"]), "wrong": start(Provider(wrong))}
    with pytest.raises(runner.WrongResult, match=f"wrong is wrong in .*: its {what}"):
        runner.check(works, case, MANY)


@pytest.mark.slow
@pytest.mark.skipif(
    bool(PROVIDERS["layers"]["compile"].obstacle(FULL)), reason="torch.compile has no compiler"
)
def test_compiled_backward_can_be_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--mode backward --cases 10x10x5 --providers compile") == 0
    told = capsys.readouterr()
    assert "compile" in told.out
    assert "mlp-ext bench" not in told.err  # torch may warn there


@pytest.mark.slow
@pytest.mark.skipif(
    bool(PROVIDERS["train"]["compile-step"].obstacle(STEP)),
    reason="torch.compile has no compiler",
)
@pytest.mark.parametrize(
    "args",
    [
        "--suite train --cases 10-5-1@10 --providers compile-step,step,fit",
        "--suite many --cases 3x10-5-1@10 --providers compile-vmap,step,fit,steps",
    ],
)
def test_compiled_step_is_a_step(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 0
    assert capsys.readouterr().err == ""
