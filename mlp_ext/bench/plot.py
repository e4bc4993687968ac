"""Draws rows: points with whiskers, on a log axis. `python -m mlp_ext.bench.plot --help`"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlp_ext.bench.rows import (
    Row,
    as_number,
    as_threads,
    by_provider,
    geometric_mean,
    replacing,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = {  # colors safe for the color-blind, and markers; others use SPARE_STYLES
    "native_fused": ("#999999", "v"),
    "native_inplace": ("#999999", "v"),
    "compile": ("#e69f00", "^"),
    "compile-step": ("#d55e00", "<"),
    "compile-max-autotune": ("#a6761d", ">"),
    "cudagraph": ("#cc79a7", "P"),
    "vmap": ("#e69f00", "^"),
    "bmm": ("#999999", "v"),
    "compile-vmap": ("#d55e00", "<"),
    "mkldnn": ("#cc79a7", "P"),
    "fused": ("#0072b2", "o"),
    "stack": ("#56b4e9", "s"),
    "step": ("#009e73", "D"),
    "fit": ("#000000", "*"),
    "steps": ("#0072b2", "o"),
}
SPARE_STYLES = (("#7f3c8d", "X"), ("#8c564b", "d"), ("#b0b0b0", "p"), ("#1a1a6e", "h"))
LINE = 0.17  # inches of height for each point
WHAT = {  # by suite or mode
    "full": "a layer, forward and backward",
    "forward": "a layer, forward",
    "backward": "a layer, backward",
    "step": "a training step",
    "many": "a training step of many networks",
}


def ratios(rows: Iterable[Row]) -> Figure:
    """Draws each provider's ratio to native with its quantiles, grouped by case; right of the line
    at 1 is faster.

    One panel for each suite, mode, activation, optimizer, dtype, device and number of threads in
    `rows`. Rows without quantiles have no whiskers. Raises ValueError if native is the only
    provider.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.provider != "native":
            panels.setdefault((row.settings, row.device_name), []).append(row)
    if not panels:
        raise ValueError("nothing to plot: native is the only provider")
    heights = [
        LINE * (len(part) + len({row.case for row in part})) + 1.5 for part in panels.values()
    ]
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, part in zip(grid, panels.values(), strict=True):
        _panel(axes, part)
    return figure


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    cases = {case: [row for row in rows if row.case == case] for case in (r.case for r in rows)}
    providers = by_provider(rows)
    spare = iter(SPARE_STYLES * len(providers))
    styles = {name: STYLES.get(name) or next(spare) for name in providers}
    middles, top = [], 0.0  # in points; each case has a line per provider and one of space
    for i, part in enumerate(cases.values()):
        bottom = top + len(part) + 1
        if i % 2 == 0:
            axes.axhspan(top, bottom, color="black", alpha=0.05, linewidth=0)
        middles.append((top + bottom) / 2)
        for line, row in enumerate(part):
            _point(axes, row, top + line + 1, *styles[row.provider])
        top = bottom
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(middles, [case.replace("@", ", batch ") for case in cases], fontsize="small")
    axes.set_ylim(top, 0)
    _log_axis(axes, [value for row in rows for value in (_low(row), _high(row))])
    axes.set_xlabel(
        "times as fast as native PyTorch (log scale); "
        + ("whiskers: 20% to 80% of the rounds" if rows[0].ratio_q20 else "medians over rounds"),
        fontsize="small",
    )
    axes.tick_params(left=False, labelsize="small")
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        axes.plot(
            [],
            color=styles[name][0],
            marker=styles[name][1],
            linestyle="",
            label=f"{name} (mean {as_number(geometric_mean([r.ratio_to_native for r in part]))}x)",
        )[0]
        for name, part in providers.items()
    ]
    axes.legend(
        handles=handles,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=3,
        frameon=False,
        fontsize="small",
        handletextpad=0.2,
    )
    axes.set_title(_title(rows[0]), fontsize="medium", pad=8 + 16 * ((len(providers) + 2) // 3))


def _point(axes: Any, row: Row, y: float, color: str, marker: str) -> None:
    if row.ratio_q20 is not None:
        axes.plot([_low(row), _high(row)], [y, y], color=color, linewidth=1.5, alpha=0.6)
    size = 8 if marker == "*" else 5
    axes.plot(row.ratio_to_native, y, marker=marker, color=color, markersize=size)
    slower = row.ratio_to_native < 1  # labels are on that side of the line at 1
    axes.annotate(
        as_number(row.ratio_to_native),
        (_low(row) if slower else _high(row), y),
        xytext=(-6 if slower else 6, 0),
        textcoords="offset points",
        ha="right" if slower else "left",
        va="center",
        fontsize="x-small",
    )


def _low(row: Row) -> float:
    return min(row.ratio_to_native, row.ratio_q20 or row.ratio_to_native)


def _high(row: Row) -> float:
    return max(row.ratio_to_native, row.ratio_q80 or row.ratio_to_native)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Around values and 1, with room for the labels of points."""
    low, high = min(1.0, *values), max(1.0, *values)
    room = max(1.1, (high / low) ** 0.1)
    low, high = low / room, high * room
    digits: Sequence[float] = (1, 2, 5) if high / low > 20 else (1, 1.5, 2, 3, 5, 7)
    if high / low < 2.5:
        digits = [n / 10 for n in range(10, 100)]
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}x" + "\nnative" * (tick == 1) for tick in ticks])
    axes.set_xlim(low, high)
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _title(row: Row) -> str:
    parts = (
        WHAT.get(row.suite) or WHAT.get(row.mode, row.mode),
        row.activation,
        row.optimizer,
        row.dtype,
    )
    threads = f", {as_threads(row.threads)}" if row.device == "cpu" else ""
    return f"{', '.join(filter(None, parts))}\n{row.device_name}{threads}, torch {row.torch}"


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the rows of CSV files; exits with status 2 and one line after a user's error."""
    from mlp_ext.commands import arguments  # one layer up; only this command needs it
    from mlp_ext_cli.arguments import Parser, file

    parser = Parser(prog="python -m mlp_ext.bench.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="+", help="what mlp-ext bench --csv wrote")
    parser.add_argument("picture", type=file, help="the file to draw")
    args = parser.parse_args(argv)
    arguments.check_picture(args.picture, parser.error, "picture")
    try:
        figure = ratios([row for path in args.csv for row in arguments.read_rows(path)])
        with replacing(args.picture) as part:
            figure.savefig(part)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
