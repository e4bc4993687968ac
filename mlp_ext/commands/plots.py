"""Plots of results, drawn by matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def file_types() -> set[str]:
    """The file types (extensions without the dot) that matplotlib can write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return set(FigureCanvasAgg.get_supported_filetypes())


def loss_curves(losses: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Draws loss over epochs, one curve per kind of layer. Equal curves all remain visible."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel="loss")
    axes.set_title(title, fontsize="medium", wrap=True)
    for i, (kind, values) in enumerate(losses.items()):
        # The first curve is broad and solid; the others are shifted dashes on top of it.
        style = {"linewidth": 5, "alpha": 0.35} if i == 0 else {"linestyle": (4 * i, (4, 4))}
        axes.plot(values, label=kind, marker="o" if len(values) == 1 else "", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
