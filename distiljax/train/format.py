"""Numbers for people: counts, bytes, durations and shares as short text.

Three significant digits, a space before the unit, decimal prefixes (k = 1,000; MB = 1,000,000 bytes). What is
not a number or not finite is shown as "–".
"""

from __future__ import annotations

import math

MISSING = "–"


def human_number(value: float | None) -> str:
    """Three significant digits: 3.2 → "3.20", 123.4 → "123", 0.00005 → "5.00e-05"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    # 9.996 is written with two decimals as 10.00: one digit too many, so the digits are counted after
    # rounding.
    rounded = round(value, decimals)
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{decimals}f}" if abs(rounded) < 1000 else f"{value:,.0f}"


def human_count(value: float | None) -> str:
    """A count with a decimal prefix: 950 → "950", 66_985_530 → "67.0 M"."""
    return _scaled(value, ("", " k", " M", " G", " T"))


def human_bytes(value: float | None) -> str:
    """A size in decimal units: 267_942_120 → "268 MB"."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def human_seconds(value: float | None) -> str:
    """A duration in its two largest units: 0.25 → "250 ms", 42 → "42 s", 3725 → "1 h 2 min"."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 0:
        return "-" + human_seconds(-value)
    if 0 < value < 0.9995:
        return f"{human_number(1000 * value)} ms"
    if value < 9.95:
        return f"{value:.1f}".removesuffix(".0") + " s"
    if value < 3600:
        units = (("min", 60), ("s", 1))
    elif value < 86_400:
        units = (("h", 3600), ("min", 60))
    else:
        units = (("d", 86_400), ("h", 3600))
    # Below an hour the rest is rounded to seconds; above, whole minutes (hours) are what has passed.
    rest = round(value) if value < 3600 else int(value)
    if rest == 3600 and value < 3600:
        return "1 h"
    parts = []
    for name, size in units:
        amount, rest = divmod(rest, size)
        if amount:
            parts.append(f"{amount} {name}")
    return " ".join(parts)


def human_percent(share: float | None) -> str:
    """A share of one in per cent with one decimal: 0.9684 → "96.8 %"."""
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.1f} %"


def _scaled(value: float | None, suffixes: tuple[str, ...]) -> str:
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 999.5 and value == int(value):
        return f"{int(value)}{suffixes[0]}"
    scaled, index = float(value), 0
    # 999.5 rounds to 1000 at three digits, so it already takes the next prefix.
    while abs(scaled) >= 999.5 and index < len(suffixes) - 1:
        scaled, index = scaled / 1000, index + 1
    return human_number(scaled) + suffixes[index]
