"""Draws README's chart from committed rows: python benchmarks/readme_chart.py."""

from pathlib import Path

from matplotlib.figure import Figure

from mlp_ext.bench.rows import as_number, read_csv

RESULTS = Path(__file__).parent / "results"
BARS = {  # provider: label, colour
    "fit": ("TrainStep(...).fit(x, y)", "#009e73"),
    "fused": ("fuse(model), in your own loop", "#56b4e9"),
    "compile-step": ("torch.compile, whole step", "#bbbbbb"),
}

rows = read_csv(RESULTS / "train-step-relu.csv")
cases = list(dict.fromkeys(row.case for row in rows))
ratios = {name: [r.ratio_to_native for r in rows if r.provider == name] for name in BARS}
figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")  # readable on a phone
axes = figure.add_subplot(xlabel="speed of a training step, eager PyTorch = 1x (log scale)")
for i, (provider, (label, colour)) in enumerate(BARS.items()):
    places = [place + 0.27 * (i - 1) for place in range(len(cases))]
    widths = [ratio - 1 for ratio in ratios[provider]]
    bars = axes.barh(places, widths, 0.25, left=1, color=colour, label=label)
    labels = [f"{as_number(ratio)}x" for ratio in ratios[provider]]
    weight = "bold" if i == 0 else "normal"
    axes.bar_label(bars, labels, padding=3, fontsize="small", fontweight=weight)
axes.set_yticks(range(len(cases)), [case.replace("@", "\nbatch ") for case in cases])
axes.invert_yaxis()
axes.axvline(1, color="black", linewidth=1)
axes.set_xscale("log")
axes.set_xlim(0.97 * min(1, *(min(part) for part in ratios.values())), 230)
ticks = [1, 2, 5, 10, 20, 50, 100]
axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
axes.minorticks_off()
axes.tick_params(left=False)
axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
axes.legend(loc="center right", frameon=False, bbox_to_anchor=(1, 0.44))
row, best = rows[0], ratios["fit"]
figure.suptitle(
    f"mlp_ext trains MLPs {as_number(min(best))}x to {as_number(max(best))}x as fast as PyTorch",
    fontweight="bold",
)
axes.set_title(
    f"{row.device_name}, {row.threads} threads, {row.dtype}, SGD, torch {row.torch}",
    fontsize="small",
    color="#555555",
)
figure.savefig(RESULTS / "readme.png")
