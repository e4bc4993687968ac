"""Whether timings are too noisy to rely on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlp_ext.bench.rows import Row, as_range

# CPUs that others may keep busy beyond those that our threads leave free. An idle machine uses less
# than 0.1, and /proc/stat counts in hundredths of a second.
OTHER_CPUS = 0.2
# 80% over 20% quantile of a row's ratios. At 1.3, if the noise is normal, the median of 20 rounds
# has a standard error of 4%: smaller gains cannot be told from none.
SPREAD = 1.3
# Share of the compute bound. Clocks vary by a few percent between its measurement and the row's.
SHARE = 1.05
Range = tuple[str, float | None, float | None]  # of what; 20% and 80% quantile of its ratios


def busy(others: float | None, threads: int, cpus: int) -> str:
    """Says that other processes needed the CPUs of our threads; "" if not.

    others: number of CPUs that they used, of the `cpus` that we may use; NaN or None if unknown.
    """
    if others is None or not others > max(0, cpus - threads) + OTHER_CPUS:
        return ""
    return f"other processes used {others:.1f} of {cpus} CPUs"


def wide(ranges: Iterable[Range]) -> str:
    """Says how many of the ranges are wide, and which is the widest; "" if none is."""
    known = [(high / low, name, low, high) for name, low, high in ranges if low and high]
    found = [one for one in known if one[0] > SPREAD]
    if not found:
        return ""
    _, name, low, high = max(found)
    what = f"{len(found)} of {len(known)} ratios vary by over {SPREAD - 1:.0%}"
    return f"{what}, {name} {as_range(low, high)}"


def noise(rows: Sequence[Row], cpus: int | None = None) -> str:
    """Why rows are unreliable and what to do, in one line; "" if they are not.

    cpus: those that the process had; None does not judge what others used of them.
    """
    threads = rows[0].threads if rows[0].device == "cpu" else 1
    others = max(row.other_cpus or 0.0 for row in rows)
    by_others = busy(others, threads, cpus) if cpus else ""
    shares = [row.share_of_bound for row in rows if row.bound == "compute" and row.share_of_bound]
    share = max(shares, default=0.0)
    too_low = f"up to {share:.0%} of the compute bound, which was measured too low"
    peers = [row for row in rows if row.provider != "native"]
    spread = wide((f"{r.provider} at {r.case}", r.ratio_q20, r.ratio_q80) for r in peers)
    found = [*filter(None, (by_others, too_low * (share > SHARE), spread))]
    remedy = "measure again" + " with more --rounds" * bool(spread)
    if by_others:
        remedy = "stop other programs and measure again"
    return f"timings unreliable: {'; '.join(found)}: {remedy}" if found else ""
