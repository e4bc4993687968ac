"""Plots of results, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, product
from typing import TYPE_CHECKING, Any

from mlp_ext.commands.summary import moments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlp_ext.bench.tuning import Choice
    from mlp_ext.commands.loop import TrainingRun

PANELS = 4  # in a row
CELLS = 200  # of a heat map, at most, that have their values written
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.4, 2, 3, 5, 10, 20)  # ticks


def file_types() -> set[str]:
    """The file types (extensions without the dot) that matplotlib can write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return set(FigureCanvasAgg.get_supported_filetypes())


def loss_curves(runs: Sequence[TrainingRun], title: str) -> Figure:
    """Draws the loss of each run over epochs, and over the training time; those of validation
    dashed.

    Each curve is narrower than the one beneath it, so that equal ones are all seen.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize="medium", wrap=True)
    epochs, time = figure.subplots(1, 2, sharey=True)
    for i, run in enumerate(runs):
        above = len(runs) - 1 - i
        color = f"C{i - 1}" if i else "0.75" if above else "C0"
        marker = "o" if len(run.losses) == 1 else ""
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5 + 3 * above}
        style |= {"solid_capstyle": "butt", "dash_capstyle": "butt"}
        seconds = [*accumulate(run.seconds)]
        for losses, line in zip(_losses(run), ("-", "--"), strict=False):
            label = run.kind if line == "-" else ""
            for axes, x, width in ((epochs, range(len(losses)), 2), (time, seconds, 1)):
                wide = 1.5 + width * above
                axes.plot(x, losses, line, label=label, linewidth=wide, **style)
    epochs.set(xlabel="epoch", ylabel="loss")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if any(run.validation for run in runs):
        epochs.plot([], [], "--", color="0.5", label="validation")
    every = (loss for run in runs for losses in _losses(run) for loss in losses)
    losses = [*filter(math.isfinite, every)]
    if losses and max(losses) - min(losses) <= 1e-3 * max(losses):  # nothing but rounding
        epochs.set_ylim(0, 2 * max(losses) or 1)
    time.set(xlabel="training time (log scale)", xscale="log")
    time.xaxis.set_major_formatter(EngFormatter("s"))
    for axes in (epochs, time):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = epochs.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _losses(run: TrainingRun) -> list[Sequence[float]]:
    """Of training and, if there are such, of validation."""
    return [run.losses, *([run.validation.losses] if run.validation else [])]


Curve = tuple[str, Sequence[int], Sequence[Sequence[float]]]  # label, epochs, values at each


def curves(found: Sequence[Curve], name: str, title: str, share: bool) -> Figure:
    """Draws the mean of each curve's values over epochs, in a band of the standard deviation.

    share: whether the values are shares, in percent. The axis of others is logarithmic.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize="small")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"]
    for i, (label, epochs, values) in enumerate(found):
        means, deviations = zip(*map(moments, values), strict=True)
        color = colors(0.9 * i / max(1, len(found) - 1))
        axes.plot(epochs, means, "o-", color=color, label=label, markersize=3)
        low, high = (
            [m + side * d for m, d in zip(means, deviations, strict=True)] for side in (-1, 1)
        )
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="epoch", ylabel=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(found) > 1:
        figure.legend(loc="outside right center", fontsize="small")
    return figure


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    best: tuple[int, int] | None,
    name: str,
    title: str,
    share: bool,
) -> Figure:
    """Draws a cell for each value, and a frame around the best one.

    share: whether the values are shares, in percent. The colors of others are logarithmic.
    """
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import PercentFormatter

    height, width = len(rows), len(columns)
    size = (4 + 0.8 * min(width, 30), 2.5 + 0.5 * min(height, 30))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(title, fontsize="small")
    axes = figure.subplots()
    colors = "viridis" if share else "viridis_r"  # the best is bright
    logarithmic = not share and any(0 < value < math.inf for row in values for value in row)
    image = axes.imshow(values, cmap=colors, norm=LogNorm() if logarithmic else None, aspect="auto")
    figure.colorbar(image, label=name, format=PercentFormatter(1) if share else None)
    axes.set_xticks(range(width), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(height), rows)
    shades = image.to_rgba(np.asarray(values))
    shown = product(range(height), range(width)) if height * width <= CELLS else ()
    for i, j in shown:
        value = values[i][j]
        red, green, blue, _ = shades[i, j]
        color = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
        text = f"{value:.1%}" if share else f"{value:.3g}"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize="x-small")
    if best:
        i, j = best
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="C3", linewidth=2))
    return figure


def limits(choices: Sequence[Choice], place: str) -> Figure:
    """Draws for each limit where its paths win, along the sizes that it bounds; those that move
    first."""
    from matplotlib.figure import Figure

    shown = sorted((c for c in choices if c.measured), key=lambda c: not c.moved)
    rows = max(1, -(-len(shown) // PANELS))
    figure = Figure(figsize=(4.5 * PANELS, 3 * rows + 1), dpi=100, layout="constrained")
    figure.suptitle(
        f"{place}. Above 1 the path below the limit is faster; whiskers: 20 % to 80 % of the "
        "rounds; dashed: the limit so far, solid: the new one"
    )
    for i, choice in enumerate(shown):
        _limit(figure.add_subplot(rows, PANELS, i + 1), choice)
    return figure


def _limit(axes: Any, choice: Choice) -> None:
    rule = choice.points[0].rule
    for k, family in enumerate(rule.families.split()):
        part = [p for p in choice.points if p.family == family]
        x = [p.size * 1.06 ** (k - 1) for p in part]  # side by side
        low, high = ([math.exp(p.range[end]) for p in part] for end in (0, 1))
        axes.vlines(x, low, high, color=f"C{k}", linewidth=1, alpha=0.5)
        y = [math.exp(p.ratio) for p in part]
        axes.plot(x, y, "o", color=f"C{k}", markersize=3, label=family)
    axes.axhline(1, color="black", linewidth=0.8)
    between = 1.15 if rule.sides.up_to else 1 / 1.15  # sizes of the ladder
    for style, limit in (("--", choice.old), ("-", choice.new))[: len(choice.texts)]:
        if limit <= 2 * rule.ladder[-1]:
            axes.axvline(max(limit, rule.ladder[0] / 1.3) * between, color="C3", linestyle=style)
    axes.set(xscale="log", yscale="log")
    middles = [math.exp(p.ratio) for p in choice.points]  # long whiskers are cut off
    axes.set_yticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS], fontsize="x-small")
    axes.set_ylim(min(0.7, *middles) / 1.2, max(1.4, *middles) * 1.2)
    sizes = rule.ladder[::2]
    names = [f"2^{n.bit_length() - 1}" if n >= 1024 else str(n) for n in sizes]
    axes.set_xticks(sizes, names, fontsize="x-small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    below, _, above = rule.names.partition(", ")
    axes.set_ylabel(f"{above} / {below}", fontsize="small")
    title = f"{choice.limit}, {choice.table}: {' to '.join(choice.texts)}"
    axes.set_title(title, fontsize="small")
    axes.legend(fontsize="xx-small", frameon=False, handletextpad=0)
