"""The last line of a command's output, in words."""

from __future__ import annotations

from collections.abc import Mapping


def fastest(speeds: Mapping[str, float]) -> str:
    """Names the fastest of what was compared with torch; speeds: torch's time / its own."""
    name = max(speeds, key=speeds.__getitem__)
    speed = speeds[name]
    digits = 2 if speed < 2 else 1 if speed < 10 else 0
    text = f"{name} was {speed:.{digits}f} times as fast as torch"
    return text if speed >= 1 else f"Nothing was faster than torch; {text}"
