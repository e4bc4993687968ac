"""Whether rows are too noisy to cite."""

from __future__ import annotations

from collections.abc import Sequence

from mlp_ext.bench.rows import Row, as_range

# CPUs that others may keep busy beyond those that our threads leave free. An idle machine uses less
# than 0.1, and /proc/stat counts in hundredths of a second.
OTHER_CPUS = 0.2
# 80 % over 20 % quantile of a row's ratios. At 1.3, if the noise is normal, the median of 20 rounds
# has a standard error of 4 %: smaller gains cannot be told from none.
SPREAD = 1.3
# Share of the compute bound. Clocks vary by a few percent between its measurement and the row's.
SHARE = 1.05


def noise(rows: Sequence[Row], cpus: int | None = None) -> str:
    """Why rows are too noisy to cite and what to do, in one line; "" if they are not.

    cpus: those that the process had; None does not judge what others used of them.
    """
    found, remedy = [], "measure again"
    shares = [row.share_of_bound for row in rows if row.bound == "compute" and row.share_of_bound]
    if max(shares, default=0.0) > SHARE:
        found.append(f"up to {max(shares):.0%} of the compute bound, which was measured too low")
    peers = [row for row in rows if row.provider != "native" and _spread(row) > 0]
    wide = [row for row in peers if _spread(row) > SPREAD]
    if wide:
        row = max(wide, key=_spread)
        found.append(
            f"{len(wide)} of {len(peers)} ratios vary by over {SPREAD - 1:.0%}, "
            f"{row.provider} at {row.case} {as_range(row.ratio_q20, row.ratio_q80)}"
        )
        remedy = "measure again with more --rounds"
    threads = rows[0].threads if rows[0].device == "cpu" else 1
    if cpus and (busy := busy_cpus(max(row.other_cpus or 0.0 for row in rows), threads, cpus)):
        found.insert(0, busy)
        remedy = "stop other programs and measure again"
    return f"too noisy to cite: {'; '.join(found)}: {remedy}" if found else ""


def busy_cpus(others: float, threads: int, cpus: int) -> str:
    """Says that other processes used CPUs that our threads need; "" if they did not."""
    if others > max(0, cpus - threads) + OTHER_CPUS:
        return f"other processes used {others:.1f} of {cpus} CPUs"
    return ""


def _spread(row: Row) -> float:
    """80 % over 20 % quantile; 0 if they are unknown."""
    return row.ratio_q80 / row.ratio_q20 if row.ratio_q20 and row.ratio_q80 else 0.0
