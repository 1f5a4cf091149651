"""Two samples of latencies side by side: what can be said of them, and a picture of every single one."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("#bab0ac", "#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#9c755f")


def superiority(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Chance that a run of ours is faster than one of theirs: the share of all pairs, ties counting half.

    The effect size that belongs to the Mann-Whitney test; 0.5 means no difference.
    """
    wins = sum((a < b) + 0.5 * (a == b) for a in ours for b in theirs)
    return wins / (len(ours) * len(theirs))


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Figures of two samples of latencies; ratios are ours over theirs, so below 1 is better."""
    median = statistics.median(theirs)
    return {
        "median_ratio": statistics.median(ours) / median,
        "best_ratio": min(ours) / min(theirs),
        "worst_ratio": max(ours) / max(theirs),
        "superiority": superiority(ours, theirs),
    }


def draw(path: Path, title: str, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draw every value of every side as a dot, with a line at each median, as SVG.

    Args:
        path: The file.
        title: Above the picture.
        groups: Values by group and side; each group is scaled to the median of its first side.
    """
    sides = list(dict.fromkeys(side for group in groups.values() for side in group))
    left, top, row, width = 260, 46, 18, 980
    scaled = {
        name: {
            side: [value / statistics.median(next(iter(group.values()))) for value in values]
            for side, values in group.items()
        }
        for name, group in groups.items()
    }
    everything = [value for group in scaled.values() for values in group.values() for value in values]
    low, high = min(0.5, *everything), max(1.5, *everything)
    height = top + sum(len(group) * row + 14 for group in groups.values()) + 40

    def x(value: float) -> float:
        return left + (width - left - 30) * (value - low) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="8" y="20" font-size="14">{html.escape(title)}</text>',
    ]
    ticks = [tick / 4 for tick in range(int(low * 4), int(high * 4) + 2) if low <= tick / 4 <= high]
    for tick in ticks:
        out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{height - 34}" stroke="#ddd"/>')
        out.append(f'<text x="{x(tick):.1f}" y="{height - 18}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<text x="{left}" y="{height - 4}">latency over the median of the first side of each group</text>')
    y = float(top)
    for name, group in scaled.items():
        out.append(f'<text x="8" y="{y + 13:.1f}">{html.escape(name[:42])}</text>')
        for side, values in group.items():
            colour = COLOURS[sides.index(side) % len(COLOURS)]
            middle = x(statistics.median(values))
            median = f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{y + 2:.1f}" y2="{y + 16:.1f}"'
            out.append(f'{median} stroke="{colour}" stroke-width="3"/>')
            out += [
                f'<circle cx="{x(v):.1f}" cy="{y + 9:.1f}" r="4" fill="{colour}" fill-opacity="0.7"/>' for v in values
            ]
            out.append(
                f'<text x="{left - 6}" y="{y + 13:.1f}" text-anchor="end" fill="{colour}">{html.escape(side)}</text>'
            )
            y += row
        y += 14
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*out, "</svg>\n"]))
