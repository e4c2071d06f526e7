"""Peak against step time of each variant: a panel of ``measure --plot``, and a drawing in ``measure --html``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from lightning_convbn.command.results import TITLES, Measurement, Variant
from lightning_convbn.memory.use import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE: tuple[Variant, ...] = ("tune", "tune-elementwise", "tune-blocks")
"""What a user can choose from without a change of the results: a line joins it."""

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 680, 280, 24, 44, 28, 230


class Point(NamedTuple):
    """The peak of a step of a variant, in MiB, and its median time, in milliseconds."""

    variant: Variant
    peak: float
    time: float


def points_of(found: Measurement) -> list[Point]:
    """Return a point for each variant that was counted and timed."""
    return [
        Point(variant, result.peak_bytes / MIB, 1000 * result.median_seconds)
        for variant, result in found.variants.items()
        if result.peak_bytes is not None and result.median_seconds is not None
    ]


def draw_points(axes: Axes, points: Sequence[Point], colours: dict[Variant, str]) -> None:
    """Draw the points in the colours of the variants, and the curve between those of Tune mode."""
    curve = [point for point in points if point.variant in CURVE]
    axes.plot([point.peak for point in curve], [point.time for point in curve], color="#64748b", linewidth=1)
    for point in points:
        axes.scatter([point.peak], [point.time], s=36, color=colours[point.variant], zorder=3)
    axes.set(xlabel="peak of a step, MiB", ylabel="step time, ms")
    axes.margins(x=0.1, y=0.2)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e2e8f0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def as_svg(points: Sequence[Point]) -> str:
    """Return the same as a drawing for a page. Its colours are those of the page's variants."""
    most_peak, most_time = 1.1 * max(point.peak for point in points), 1.1 * max(point.time for point in points)

    def place(point: Point) -> tuple[float, float]:
        x = _LEFT + point.peak / most_peak * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - point.time / most_time * (_HEIGHT - _BOTTOM - _TOP)

    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(point) for point in points if point.variant in CURVE))
    base, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{base}H{right}"/>',
        f'<polyline class="curve" points="{curve}"/>',
        f'<text x="{right}" y="{_HEIGHT - 10}" text-anchor="end">peak of a step, MiB</text>',
        f'<text x="{_LEFT}" y="{_TOP - 9}">step time, ms</text>',
    ]
    for line, point in enumerate(points):
        (x, y), middle = place(point), _TOP + 6 + 26 * line
        text = f"{TITLES[point.variant]}: {point.peak:,.1f} MiB, {point.time:,.1f} ms"
        parts.append(
            f'<g class="{point.variant}"><circle cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title></circle>'
            f'<circle cx="{right + 24}" cy="{middle}" r="5"/>'
            f'<text x="{right + 36}" y="{middle + 4}">{escape(TITLES[point.variant])}</text></g>'
        )
    opening = f'<svg class="trade-off" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Peak against step time">'
    return f"{opening}{''.join(parts)}</svg>"
