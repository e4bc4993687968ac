"""Plots of results, drawn by matplotlib without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mlp_ext.commands.loop import TrainingRun


def file_types() -> set[str]:
    """The file types (extensions without the dot) that matplotlib can write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return set(FigureCanvasAgg.get_supported_filetypes())


def loss_curves(runs: Sequence[TrainingRun], title: str) -> Figure:
    """Draws the loss of each run over epochs, and over the training time.

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
        style = {"label": run.kind, "color": color, "solid_capstyle": "butt", "marker": marker}
        epochs.plot(run.losses, **style, linewidth=1.5 + 2 * above, markersize=5 + 3 * above)
        seconds = [*accumulate(run.seconds)]
        time.plot(seconds, run.losses, **style, linewidth=1.5 + above, markersize=5 + 3 * above)
    epochs.set(xlabel="epoch", ylabel="loss")
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    losses = [loss for run in runs for loss in run.losses if math.isfinite(loss)]
    if losses and max(losses) - min(losses) <= 1e-3 * max(losses):  # nothing but rounding
        epochs.set_ylim(0, 2 * max(losses) or 1)
    time.set(xlabel="training time (log scale)", xscale="log")
    time.xaxis.set_major_formatter(EngFormatter("s"))
    for axes in (epochs, time):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*epochs.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs))
    return figure
