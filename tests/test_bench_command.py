"""The command `mlp-ext bench`: its arguments, its tables, its files."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from benching import TINY, run
from terminals import on_terminal

import mlp_ext
from mlp_ext import _C
from mlp_ext.bench import machine, runner
from mlp_ext.bench.cases import SUITES, Layer, Setting, parse, parse_all
from mlp_ext.bench.providers import PROVIDERS, Provider
from mlp_ext.bench.rows import COLUMNS, as_number, read_csv
from mlp_ext.commands import progress
from mlp_ext_cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 1e-4)


@pytest.fixture
def stub_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor of 2 GFLOP/s on each thread."""
    monkeypatch.setattr(_C, "peak_flops", lambda seconds, threads, dtype: 2e9 * threads)
    monkeypatch.setattr(machine, "COPIED", {"cpu": (2**12, 2**16)})
    monkeypatch.setattr(machine, "GEMM", {"cpu": 64})
    monkeypatch.setattr(machine, "PEAK_SECONDS", 0.002)


@pytest.mark.slow
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
        assert 0 < row.ratio_q20 <= row.ratio_to_native <= row.ratio_q80
        assert row.bound in machine.BOUNDS
        assert row.share_of_bound > 0
        path = "narrow/small" if row.case == "10x10x5" else "small"
        assert row.path == {"native": "", "fused": path}[row.provider]
    assert (tmp_path / "rows.csv").read_text().startswith(",".join(COLUMNS) + "\nlayers,10x10x5,")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.csv", "rows.json"}


NUMBER, RATIO, RANGE = r"\d[\d.]* [mun]?s", r"\d[\d.]*x", r"\d[\d.]*-\d[\d.]*"


@pytest.mark.slow
def test_table_has_a_block_for_each_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--suite train --cases 10-5-1@10,3-2@4 --providers fused,step") == 0
    out, err = capsys.readouterr()
    title, place, heading, *lines = out.splitlines()
    assert title == "train step relu sgd float32"
    assert place == f"{machine.device_name('cpu')}, 1 thread"
    assert heading.split() == ["time", "speed", "20-80%", "path"]
    for case, part in (("10-5-1@10", lines[:4]), ("3-2@4", lines[4:8])):
        assert part[0] == case
        assert re.fullmatch(f"  native +{NUMBER}", part[1])
        assert re.fullmatch(f"  fused +{NUMBER} +{RATIO} +{RANGE}", part[2])
        assert re.fullmatch(f"  step +{NUMBER} +{RATIO} +{RANGE}  (blocks|lanes)", part[3])
    assert lines[8] == "geometric mean"
    for name, line in zip(("fused", "step"), lines[9:11], strict=True):
        assert re.fullmatch(f"  {name} +{RATIO}  least {RATIO} at (10-5-1@10|3-2@4)", line)
    assert all(line.startswith("timings unreliable: ") for line in lines[11:12])
    assert err == ""


@pytest.mark.slow
def test_tables_fit_a_terminal(stub_peak: None, capsys: pytest.CaptureFixture[str]) -> None:
    names = "native_fused,fused,stack,step,fit"
    assert run(f"--suite train --cases 10-5-1@10,3-2@4 --peak --providers {names}") == 0
    assert run("--suite many --cases 99x10-5-1@10,9x3-2@4 --peak --providers vmap,fit") == 0
    assert main(["bench", "--list"]) == 0
    assert main(["bench", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = f"{machine.device_name('cpu')}, 1 thread"
    assert [line for line in lines if len(line) > 80 and line != place] == []


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
        "mlp-ext bench: mkldnn skipped: forward on the CPU only",
        "mlp-ext bench: native_inplace skipped: for relu only",
        "mlp-ext bench: fused-cudagraph skipped: on cuda only",
        "mlp-ext bench: addmm_activation skipped: on cuda only",
    ]
    assert [line.split()[0] for line in out.splitlines()[3:]][:2] == ["4x3x2", "native"]
    assert "fused" not in out


@pytest.mark.slow
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
    ratios = {row.provider: row.ratio_to_native for row in read_csv(path) if row.case == "4x3x2"}
    means = capsys.readouterr().out.partition("geometric mean\n")[2].splitlines()
    assert f"narrow {as_number(ratios['narrow'])}x" in [" ".join(m.split()[:2]) for m in means]


@pytest.mark.slow
def test_published_cases_are_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for suite, case in TINY.items():
        tiny = SUITES[suite]._replace(cases=(parse(suite, case),))
        monkeypatch.setitem(SUITES, suite, tiny)
        path = tmp_path / f"{suite}.csv"
        assert run(f"--suite {suite} --providers native", "--csv", str(path)) == 0
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
    place, peak = capsys.readouterr().out.splitlines()
    assert place == f"{machine.device_name('cpu')}, 2 threads"
    pattern = f"peak: 4 GFLOP/s float32, copy {number} GB/s .cached {number}., call {number} [mun]s"
    assert re.fullmatch(pattern, peak)


@pytest.mark.parametrize(("dtype", "least"), [("float64", 1e9), ("bfloat16", 2e9)])
def test_peak_is_of_the_dtype(stub_peak: None, dtype: str, least: float) -> None:
    flops = machine.measure_peak(Setting("layers", "full", dtype=dtype)).flops
    assert flops == least if dtype == "float64" else flops >= least


def test_share_of_the_bound_is_printed(stub_peak: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--peak --cases 10x10x5 --providers fused") == 0
    _, _, peak, heading, case, *lines = capsys.readouterr().out.splitlines()
    assert peak.startswith("peak: 2 GFLOP/s float32, ")
    assert "of bound" in heading
    assert re.fullmatch(f"10x10x5, (compute|memory|latency) bound: {NUMBER}", case)
    assert re.fullmatch(rf"  native +{NUMBER} +\d+%", lines[0])
    assert re.fullmatch(rf"  fused +{NUMBER} +{RATIO} +{RANGE} +\d+%  narrow/small", lines[1])


def test_list_says_what_applies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--dtype", "float64"]) == 0
    out, err = capsys.readouterr()
    for suite, table in PROVIDERS.items():
        assert f"{suite}: cases {SUITES[suite].form}; --mode " in out
        for name, provider in table.items():
            here = "no " if provider.obstacle(Setting(suite, "full", dtype="float64")) else "yes"
            assert re.search(f"^  {name} +{here}  {re.escape(provider.about[:20])}", out, re.M)
    assert main(["bench", "--list", "--suite", "train"]) == 0
    assert "layers:" not in capsys.readouterr().out
    assert err == ""


def test_readme_names_every_provider() -> None:
    assert [
        name for table in PROVIDERS.values() for name in table if f"`{name}`" not in README
    ] == []


# --- Own providers ---

README = (ROOT / "benchmarks" / "README.md").read_text()
FAULTY = """
def half(setting):
    return lambda x, w, b: mine(setting)(x, w, b) * 0.5

def fails(setting):
    raise KeyError("no such kernel")

def fused(setting):
    return mine(setting)

def descend_each(models, criterion, optimizers):
    steps = [descend(m, criterion, o) for m, o in zip(models, optimizers)]
    return lambda input, target: torch.stack([step(input, target) for step in steps])
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    path.write_text("\n".join([*examples, FAULTY]))
    return path


@pytest.mark.parametrize(
    ("args", "name"),
    [
        ("--cases 4x3x2 --providers fused", "mine"),
        ("--suite train --cases 10-5-1@10", "descend"),
        ("--suite many --cases 3x10-5-1@10", "descend_each"),
    ],
)
def test_own_provider_is_measured(args: str, name: str, own: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    names = "" if "--providers" in args else " --providers step"
    assert run(args + names, "--provider", f"{own}:{name}", "--csv", str(path)) == 0
    rows = read_csv(path)
    assert rows[-1].provider == name
    assert len(rows) == 3
    assert rows[-1].path == ""


@pytest.mark.parametrize(
    ("function", "status", "message"),
    [
        ("half", 1, "half is wrong in full relu float32 4x3x2: its output differs from native's"),
        ("fails", 1, "fails fails in full relu float32 4x3x2: KeyError: 'no such kernel'"),
        ("descend", 1, "descend fails in full relu float32 4x3x2: TypeError: descend() missing 2"),
        ("mein", 2, "argument --provider: own.py has no attribute 'mein'; did you mean mine?"),
        ("torch", 2, "argument --provider: own.py:torch is a builtins.module, not a function"),
        ("fused", 2, "argument --provider: fused already exists; rename yours"),
        ("", 2, "argument --provider: must be module:name or FILE.py:name, got 'own.py:'"),
    ],
)
def test_fault_of_an_own_provider_is_one_line(
    function: str,
    status: int,
    message: str,
    own: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(own.parent)
    monkeypatch.setattr(runner, "in_turn", pytest.fail)
    args = "--cases 4x3x2 --providers fused"
    assert run(args, "--provider", f"own.py:{function}") == status
    err = capsys.readouterr().err
    assert err.startswith(f"mlp-ext bench: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file own.py"),
        ("import nothing_like_it", "own.py fails: ModuleNotFoundError: No module named 'nothing_"),
        ("def mine(setting", "own.py fails: SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "own.py fails: SystemExit: 3"),
        ("", "own.py has no attribute 'mine'"),
    ],
)
def test_file_that_does_not_run_is_an_error(
    content: str | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("own.py").write_text(content)
    assert run("--cases 4x3x2", "--provider", "own.py:mine") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"mlp-ext bench: error: argument --provider: {message}")
    assert err.count("\n") == 1


# --- Errors ---

ERRORS = [
    ("--suite kernels", "argument --suite: must be one of "),
    ("--mode sideways", "argument --mode: must be one of "),
    (
        "--mode step",
        "argument --mode: layers has full, forward, backward, got 'step'; step is in --suite train",
    ),
    ("--suite train --mode full", "argument --mode: train has step, got 'full'"),
    ("--cases 64x784", "argument --cases: a case of layers must be MxKxN, e.g. 64x784x256, got"),
    ("--cases 10x10x5,", "argument --cases: a case of layers must be MxKxN"),
    ("--cases 0x1x1", "argument --cases: a case of layers must be MxKxN"),
    ("--suite train --cases 10x10x5", "argument --cases: a case of train must be WIDTHS@BATCH"),
    ("--suite train --cases sweep", "argument --cases: a case of train must be WIDTHS@BATCH"),
    ("--suite many --cases 10-5-1@10", "argument --cases: a case of many must be NETWORKSxWIDTHS@"),
    (
        "--cases 1x2147483647x2147483647",
        "argument --cases: 1x2147483647x2147483647: ",
    ),  # 2e19 bytes
    ("--providers jax", "argument --providers: layers has native, native_inplace, compile, "),
    ("--providers fused,", "argument --providers: layers has "),
    ("--providers fusde", "argument --providers: layers has native, native_inplace, "),
    ("--provider own.txt:f", "argument --provider: there is no module own"),
    ("--suite train --providers mkldnn", "argument --providers: train has native, native_fused, "),
    ("--activation swish", "argument --activation: must be one of "),
    ("--suite many --providers fused", "argument --providers: many has native, vmap, bmm, "),
    ("--suite train --optimizer lion", "argument --optimizer: must be one of "),
    ("--optimizer adam", "argument --optimizer: layers has none; use --suite train"),
    ("--dtype int8", "argument --dtype: must be one of "),
    ("--dtype tf32", "argument --dtype: tf32 requires --device cuda"),
    ("--device tpu", "argument --device: must be one of "),
    ("--threads 0", "argument --threads: must be a whole number from 1 to 2147483647, got '0'"),
    ("--rounds 0", "argument --rounds: must be a whole number from 1 to 2147483647, got '0'"),
    ("--csv missing/rows.csv", "argument --csv: cannot write 'missing/rows.csv': No such file"),
    ("--json missing/rows.json", "argument --json: cannot write 'missing/rows.json': No such"),
    ("--csv .", "argument --csv: '.' is not a file"),
    ("--csv rows --json rows", "argument --json: is the file of --csv; name another"),
    ("--plot bars.xyz", "argument --plot: the file must end in one of "),
    ("--plot bars.png --providers native", "argument --plot: nothing to plot"),
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


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("--providers native,step", "got 'step'; step is in --suite train"),
        ("--providers fusde", "got 'fusde'; did you mean fused?"),
        ("--cases 784-256-10@64", "got '784-256-10@64'; use --suite train"),
        ("--cases 9x784-10@64", "got '9x784-10@64'; use --suite many"),
        ("--suite train --cases 3x2-1@4,5-1@4", "got '3x2-1@4'"),
    ],
)
def test_error_has_a_hint(args: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args.split()]) == 2
    assert capsys.readouterr().err.endswith(f"{hint}\n")


@pytest.mark.parametrize("args", ["--device cuda", "--device cuda --peak"])
def test_absent_cuda_is_an_error(
    args: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *args.split()]) == 2
    message = "mlp-ext bench: error: argument --device: no CUDA device available\n"
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


@pytest.mark.slow
def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    assert run("--cases 4x3x2,5x3x2 --providers fused") == 0
    assert "/6 [" in terminal.getvalue()
    assert "4x3x2" in terminal.getvalue()


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.png"
    assert run("--cases 4x3x2 --providers fused", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
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
