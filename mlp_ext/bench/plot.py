"""Draws rows: bars of ratio to native, a line at 1. `python -m mlp_ext.bench.plot --help`"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlp_ext.bench.rows import Row, by_provider, geometric_mean, read_csv, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {  # colour-blind safe; other providers use SPARE_COLOURS
    "fused": "#0072b2",
    "compile": "#e69f00",
    "native_inplace": "#999999",
    "mkldnn": "#cc79a7",
    "compile-max-autotune": "#f0e442",
    "compile-step": "#d55e00",
    "native_fused": "#999999",
    "stack": "#56b4e9",
    "step": "#009e73",
    "fit": "#000000",
}
SPARE_COLOURS = ("#7f3c8d", "#8c564b", "#b0b0b0", "#1a1a6e")
BAR = 0.19  # inches
LOGARITHMIC_FROM = 20  # ratio from which the axis is logarithmic


def ratios(rows: Iterable[Row]) -> Figure:
    """Draws bars of each provider's ratio to native, grouped by case; above 1 is faster.

    One panel for each suite, mode, activation, optimizer, dtype, device and number of threads in
    `rows`. Bars are labelled with the ratio, and the share of peak if known. Raises ValueError if
    native is the only provider.
    """
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.provider != "native":
            panels.setdefault(_title(row), []).append(row)
    if not panels:
        raise ValueError("nothing to draw: no provider besides native")
    heights = [BAR * (len(part) + len({row.case for row in part})) + 1 for part in panels.values()]
    figure = Figure(figsize=(8, sum(heights)), dpi=150, layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, part) in zip(grid, panels.items(), strict=True):
        axes.set_title(title, fontsize="medium", wrap=True)
        _panel(axes, part)
    return figure


def _title(row: Row) -> str:
    threads = f", {row.threads} thread{'s' * (row.threads > 1)}" if row.device == "cpu" else ""
    what = filter(None, (row.suite, row.mode, row.activation, row.optimizer, row.dtype))
    return (
        f"{', '.join(what)}: times as fast as native torch\n"
        f"{row.device_name}{threads}, torch {row.torch}"
    )


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    providers = by_provider(rows)
    spare = iter(SPARE_COLOURS * len(providers))
    height = 0.85 / len(providers)
    for i, (name, part) in enumerate(providers.items()):
        bars = axes.barh(
            [cases.index(row.case) + (i + 0.5) * height - 0.425 for row in part],
            [row.ratio_to_native for row in part],
            height=0.9 * height,
            color=COLOURS.get(name) or next(spare),
            label=f"{name}, geometric mean {geometric_mean([r.ratio_to_native for r in part]):.2f}",
        )
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides lines behind labels
        labels = [_label(row) for row in part]
        axes.bar_label(bars, labels, padding=4, fontsize="small", bbox=clear)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    ratios = [1.0, *(row.ratio_to_native for row in rows)]
    if max(ratios) > LOGARITHMIC_FROM:
        axes.set_xscale("log")
        axes.set_xlim(0.8 * min(ratios), 4 * max(ratios))
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, 1.25 * max(ratios))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, borderaxespad=2
    )


def _label(row: Row) -> str:
    share = "" if row.share_of_peak is None else f"  ({row.share_of_peak:.0%} of peak)"
    return f"{row.ratio_to_native:.2f}{share}"


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
        figure = ratios([row for path in args.csv for row in read_csv(path)])
        with replacing(args.picture) as part:
            figure.savefig(part)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
