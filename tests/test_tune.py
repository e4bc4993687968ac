"""The command `mlp-ext tune`: rules that decide, limits that are found, files that are read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench.cases import Layer
from mlp_ext.bench.plans import LAYER_PATHS, STEP_PATHS, paths, plan
from mlp_ext.bench.tuning import IF_LIBRARY, NEVER, OF_MANY, RULES, Point, choose, measure, points
from mlp_ext.commands import tune
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fma": "float32", "converted": "float16", "bf16_dot": "bfloat16", "amx": "bfloat16"}
LIMITS = {rule.limit: rule for rule in RULES}
TILES = {limit for limit in LIMITS if limit.startswith("amx")}


@pytest.fixture(autouse=True)
def own_machine() -> Iterator[None]:
    yield
    _C.use_machine(None)
    _C.force_dot_mode(None)


@pytest.fixture(params=DTYPES)
def table(request: pytest.FixtureRequest) -> str:
    if request.param != "converted":
        _C.force_dot_mode(request.param)
    return str(request.param)


@cache
def near(table: str, machine: str = "generic", threads: int = 2) -> dict[str, list[Point]]:
    """The points by limit."""
    found: dict[str, list[Point]] = {}
    for point in points(_C.machine(machine), [DTYPES[table]], threads):
        assert point.table == table
        found.setdefault(point.rule.limit, []).append(point)
    return found


def of(limit: str) -> list[Point]:
    """Its points in a mode that has it, not measured."""
    mode = "amx" if limit in TILES else "bf16_dot"
    _C.force_dot_mode(mode)
    part = near("fma" if limit not in TILES and not limit.startswith("library") else mode)[limit]
    return [replace(point, ratios=[]) for point in part]


def test_every_limit_has_one_rule() -> None:
    assert len(LIMITS) == len(RULES)
    assert {*LIMITS, *OF_MANY} == {*_C.machine()["fma"]}
    for rule in RULES:
        assert [*rule.ladder] == sorted({*rule.ladder}) and len(rule.ladder) > 2
        assert {*rule.also} < {*LIMITS}


def test_limits_of_the_library_stay_above_small_ones() -> None:
    assert LIMITS["small_multiply_adds"].ladder[-1] < LIMITS["library_multiply_adds"].ladder[0]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("machine", _C.machines())
def test_limits_have_points(table: str, machine: str, threads: int) -> None:
    """Limits out of range raise."""
    found = near(table, machine, threads)
    if table == "fma" and threads == 2:
        with_library = _C.machine(machine)["fma"]["library_multiply_adds"] < NEVER
        assert {*found} == {*LIMITS} - TILES - {*([] if with_library else IF_LIBRARY)}
    if table == "amx":
        assert {*found} >= {*IF_LIBRARY, *TILES, "library_weights", "dot_rows"}


def test_the_paths_take_all_shapes(table: str) -> None:
    """They are those that the rule names."""
    for limit, part in near(table).items():
        names = LIMITS[limit].names.split(", ")
        for point in part:
            for name, side in zip(names, (point.below, point.above), strict=True):
                _C.use_machine(side)
                case, setting = point.case, point.setting
                if isinstance(case, Layer) and name in LAYER_PATHS:
                    taken = paths(plan(case, setting, forced=name))
                    ways = [*taken] if setting.mode == "full" else [setting.mode]
                    assert all(taken[way] == name for way in ways), f"{limit}: {case}"
                elif name in STEP_PATHS:
                    assert paths(plan(case, setting))["step"] == name, f"{limit}: {case}"


def planted(part: Sequence[Point], cut: int, noise: float, seed: int = 0) -> None:
    """Below is 10 % faster up to so many sizes, then slower; measured in five rounds of visits."""
    draw, now = random.Random(seed), [0.0]
    sizes = sorted({p.size for p in part})
    gain = 0.0 if cut < 0 else 0.1

    def visit(point: Point) -> list[float]:
        now[0] += 1
        sign = 1 if sizes.index(point.size) < cut else -1
        return [sign * gain + draw.gauss(0, noise) for _ in range(3)]

    measure(part, 5 * len(part), visit, lambda: now[0])
    assert [len(p.ratios) for p in part] == [15] * len(part)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_planted_limit_is_found(limit: str) -> None:
    """From any old one, through noise and one point that is far off: to a step of the ladder, since
    one point alone moves nothing."""
    for cut in range(len({p.size for p in of(limit)}) + 1):
        part = of(limit)
        planted(part, cut, 0.03, seed=cut)
        sizes = sorted({p.size for p in part})
        up_to = part[0].rule.sides.up_to
        off = part[1 if cut > len(sizes) // 2 else -2]
        off.ratios = [-10 * ratio for ratio in off.ratios]
        for old in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
            choice = choose(part, old)
            below = [s for s in sizes if s < choice.new or (s == choice.new and up_to)]
            assert abs(len(below) - cut) <= 1
            assert bool(choice.moved) == (choice.new != choice.old)
            _C.use_machine({"fma": {limit: choice.new}})  # in its range
        if cut == len(sizes) and part[0].rule.sides.may_be_never:
            assert choose(part, sizes[0]).new == NEVER


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_stays_where_both_are_equal(limit: str) -> None:
    for seed in range(3):
        part = of(limit)
        planted(part, -1, 0.1, seed)
        old = sorted({p.size for p in part})[1]
        choice = choose(part, old)
        assert (choice.new, choice.moved) == (old, ())


def test_a_limit_stays_for_one_percent_and_for_one_point() -> None:
    part = of("dot_rows")
    sizes = sorted({p.size for p in part})
    for gain, family in ((0.01, ""), (0.2, part[0].family)):
        for point in part:
            gains = not family or (point.family, point.size) == (family, sizes[0])
            point.ratios = [gain * gains] * 9
        only = [p for p in part if not family or p.family == family]
        assert choose(only, 1).new == 1


def test_a_limit_stays_where_one_kind_of_shapes_loses_as_much() -> None:
    part = of("dot_rows")
    families = sorted({p.family for p in part})
    for point in part:
        point.ratios = [-0.2 if point.family == families[0] else 0.1] * 9
    assert choose(part, 16).new == 16


def test_a_limit_stays_until_all_its_points_are_measured() -> None:
    part = of("dot_rows")
    planted(part, 0, 0.0)
    part[-1].ratios.clear()
    choice = choose(part, 64)
    assert (choice.new, choice.measured) == (64, False)


def run(args: str, *files: str) -> int:
    return main(["tune", "--threads", "1", "--dtype", "float32", *args.split(), *files])


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def dots_never_win(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(found: Sequence[Point], seconds: float, **_: Any) -> None:
        assert seconds == 30
        for point in found:
            faster = {"dot_rows": -0.2}.get(point.rule.limit, 0.0)
            point.ratios += [faster, faster + 0.001, faster - 0.001]

    monkeypatch.setattr(tune, "measure", measured)


@pytest.mark.slow
def test_the_file_is_read_where_it_is_named(
    in_folder: Path, dots_never_win: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _C.machine()
    assert run("--minutes 0.5 --out own.json") == 0
    out, err = capsys.readouterr()
    assert (err, _C.machine()) == ("", before)
    assert all(len(line) < 80 for line in out.splitlines()[1:-1])
    row = next(line.split() for line in out.splitlines() if line.startswith("dot_rows"))
    old = before["fma"]["dot_rows"]
    assert row[:5] == ["dot_rows", "fma", str(old), "1", "1.22x"]
    assert out.endswith(
        "Wrote 1 limit to own.json and the picture own.png; "
        "to use them: MLP_EXT_MACHINE=own.json python ...\n"
    )
    assert {path.name for path in in_folder.iterdir()} == {"own.json", "own.png"}
    name = f"{before['name']}-tuned"
    assert json.loads((in_folder / "own.json").read_text()) == {
        "name": name,
        "fma": {"dot_rows": 1},
    }
    code = (
        "import json; from mlp_ext_cli import main; main(['info']); "
        "from mlp_ext import _C; print(json.dumps(_C.machine()))"
    )
    path = os.pathsep.join([str(Path(mlp_ext.__file__).parents[1]), *sys.path[1:]])
    env = os.environ | {"MLP_EXT_MACHINE": "own.json", "PYTHONPATH": path}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert found.stderr == ""
    *info, limits = found.stdout.splitlines()
    assert ["machine", name] in [line.split() for line in info]
    assert json.loads(limits) == before | {
        "name": name,
        "fma": before["fma"] | {"dot_rows": 1},
    }


@pytest.mark.slow
def test_earlier_limits_of_the_user_stay_in_the_file(in_folder: Path, dots_never_win: None) -> None:
    detected = _C.machine()
    _C.use_machine({"name": "mine", "fma": {"few_rows": 2}, "converted": {"few_rows": 3}})
    assert run("--minutes 0.5") == 0
    assert json.loads((in_folder / "machine.json").read_text()) == {
        "name": f"{detected['name']}-tuned",
        "fma": {"dot_rows": 1, "few_rows": 2},
        "converted": {"few_rows": 3},
    }


@pytest.mark.slow
def test_points_are_measured_and_time_may_be_short(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--minutes 0.01 --out own.json --plot picture.pdf") == 0
    out = capsys.readouterr().out
    assert "not all of their points were measured; more --minutes" in out
    assert "Wrote 0 limits to own.json" in out
    assert {path.name for path in in_folder.iterdir()} == {"own.json", "picture.pdf"}


def test_interrupted_it_writes_nothing(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = _C.machine()
    monkeypatch.setattr(tune, "measure", stop)
    assert run("--minutes 1") == 130
    assert ([*in_folder.iterdir()], _C.machine()) == ([], before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--minutes 0", "argument --minutes: must be a number above 0, got '0'"),
        ("--minutes nan", "argument --minutes: must be a number above 0, got 'nan'"),
        ("--out none/own.json", "argument --out: cannot write 'none/own.json': No such file"),
        ("--out own.png", "argument --out: is the file of --plot; name another"),
        ("--plot own.txt", "argument --plot: the file must end in one of "),
        ("--dtype float64", "argument --dtype: must be one of float32, bfloat16, float16, got"),
    ],
)
def test_error_is_one_line(
    args: str, message: str, assert_refused: Callable[[str, str, str], None]
) -> None:
    pytest.importorskip("matplotlib")
    assert_refused("tune", f"--threads 1 --dtype float32 {args}", message)
