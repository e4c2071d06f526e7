"""Writes the page of ``measure --html`` with plotly: the table, peak against step time, and what each block keeps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.plot import COLOURS
from lightning_convbn.command.results import TITLES, Measurement
from lightning_convbn.memory.use import MIB

_ROW, _POINTS, _GAP, _BAR = 44, 320, 120, 6  # heights in pixels
_LONGEST_NAME = 45


def check_plotly() -> None:
    """Raise a `CommandError` if plotly is missing."""
    if find_spec("plotly") is None:
        raise CommandError("--html needs plotly; pip install plotly")


def write_report(path: Path, title: str, lines: Sequence[str], found: Measurement) -> None:
    """Write one page that needs no network. All names are escaped.

    Args:
        path: The file.
        title: What was measured.
        lines: What stands below the title.
        found: What was found. Peak against step time is left out if nothing was timed.
    """
    from plotly.subplots import make_subplots

    bars = max(_BAR * (len(found.variants) + 1) * len(found.blocks), _POINTS)
    heights = [_ROW * (len(found.variants) + 2), *([_POINTS] if found.points() else []), bars]
    total = sum(heights) + _GAP * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        row_heights=heights,
        vertical_spacing=_GAP / total,
        specs=[[{"type": "table"}], *[[{"type": "xy"}]] * (len(heights) - 1)],
    )
    figure.add_trace(_table(found), row=1, col=1)
    if found.points():
        _add_points(figure, found)
    _add_blocks(figure, found, row=len(heights), top=(bars + _GAP / 2) / total)
    text = "<br>".join(
        [f"<b>{_literal(title)}</b>", *(f'<span style="font-size:13px">{_literal(line)}</span>' for line in lines)]
    )
    top = 70 + 20 * len(lines)
    figure.update_layout(
        template="plotly_white",
        title={"text": text, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 20}},
        height=total + top + 60,
        margin={"t": top, "b": 60, "l": 20, "r": 20},
        legend={"orientation": "h", "y": 1 - (heights[0] + 10) / total, "yanchor": "top"},
    )
    figure.write_html(path, include_plotlyjs=True, config={"displaylogo": False})


def _table(found: Measurement) -> Any:
    from plotly import graph_objects

    titles, rows = found.as_table()
    columns = [*zip(*rows, strict=True)]
    looks = {"height": _ROW, "align": ["left", *["right"] * (len(titles) - 1)]}
    widths = [6 + max(map(len, column)) for column in columns]
    return graph_objects.Table(
        header={"values": titles, **looks}, cells={"values": columns, **looks}, columnwidth=widths
    )


def _add_points(figure: Any, found: Measurement) -> None:
    for variant, peak, time in found.points():
        figure.add_scatter(
            x=[peak],
            y=[time],
            mode="markers",
            marker={"color": COLOURS[variant], "size": 11},
            legendgroup=variant,
            showlegend=False,
            name=TITLES[variant],
            hovertemplate="%{x:,.1f} MiB, %{y:,.1f} ms",
            row=2,
            col=1,
        )
    figure.update_xaxes(title="peak of a step, MiB", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title="step time, ms", rangemode="tozero", row=2, col=1)


def _add_blocks(figure: Any, found: Measurement, row: int, top: float) -> None:
    """Add a bar for each variant of each block, and buttons for the order of the blocks."""
    names = [_literal(block.name) for block in found.blocks]
    for variant in found.variants:
        figure.add_bar(
            x=[block.saved_bytes[variant] / MIB for block in found.blocks],
            y=names,
            orientation="h",
            marker={"color": COLOURS[variant]},
            legendgroup=variant,
            name=TITLES[variant],
            customdata=[f"<b>{_literal(block.name)}</b><br>{_literal(block.about)}" for block in found.blocks],
            hovertemplate="%{customdata}<br>%{x:,.3f} MiB",
            row=row,
            col=1,
        )
    ends = [
        f"…{block.name[-_LONGEST_NAME:]}" if len(block.name) > _LONGEST_NAME else block.name for block in found.blocks
    ]
    figure.update_xaxes(title="MiB kept for the backward pass", side="top", row=row, col=1)
    figure.update_yaxes(
        autorange="reversed", tickvals=names, ticktext=[*map(_literal, ends)], automargin=True, row=row, col=1
    )
    axis = f"yaxis{row - 1 if row > 2 else ''}.categoryorder"
    orders = {"order of the model": "trace", "largest first": "max descending"}
    buttons = [{"label": name, "method": "relayout", "args": [{axis: order}]} for name, order in orders.items()]
    place = {"x": 1, "xanchor": "right", "y": top, "yanchor": "middle"}
    figure.update_layout(updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, **place}])


def _literal(text: str) -> str:
    """Escape what plotly would take for markup. It knows no entity for a quotation mark."""
    return escape(text, quote=False)
