"""Draws README's chart from committed rows: python benchmarks/readme_chart.py."""

from pathlib import Path

from matplotlib.figure import Figure

from mlp_ext.bench.rows import read_csv

RESULTS = Path(__file__).parent / "results"
BARS = {  # provider: label, colour
    "compile-step": ("torch.compile of the whole step", "#e69f00"),
    "fused": ("mlp_ext.fuse(model)", "#56b4e9"),
    "fit": ("mlp_ext.TrainStep.fit", "#009e73"),
}

rows = read_csv(RESULTS / "train-step-relu.csv")
cases = list(dict.fromkeys(row.case for row in rows))
figure = Figure(figsize=(8, 5.2), dpi=125, layout="constrained")
axes = figure.add_subplot(xlabel="times as fast as eager PyTorch (log scale)")
for i, (provider, (label, colour)) in enumerate(BARS.items()):
    ratios = [row.ratio_to_native for row in rows if row.provider == provider]
    places = [place + 0.27 * (i - 1) for place in range(len(cases))]
    bars = axes.barh(places, [r - 1 for r in ratios], 0.25, left=1, color=colour, label=label)
    labels = [f"{r:.0f}" if r > 99 else f"{r:.2f}" for r in ratios]
    axes.bar_label(bars, labels, padding=3, fontsize="small")
axes.set_yticks(range(len(cases)), [case.replace("@", ", batch ") for case in cases])
axes.invert_yaxis()
axes.axvline(1, color="black", linewidth=1)
axes.set_xscale("log")
axes.set_xlim(0.97 * min(1, *(row.ratio_to_native for row in rows if row.provider in BARS)), 200)
ticks = [1, 2, 4, 10, 20, 50, 100]
axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
axes.minorticks_off()
axes.grid(axis="x", alpha=0.3)
axes.set_axisbelow(True)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(loc="center right", frameon=False)
row = rows[0]
axes.set_title(
    f"One training step: forward, loss, backward, SGD update\n"
    f"{row.device_name}, {row.threads} threads, {row.dtype}, torch {row.torch}",
    fontsize="medium",
)
figure.savefig(RESULTS / "readme.png")
