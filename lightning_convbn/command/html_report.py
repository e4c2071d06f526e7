"""Writes the page of ``measure --html``: what each block keeps, and peak against step time.

The style and the script are in `html_report.html`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from lightning_convbn.command.bytes_per_block import sum_by_section
from lightning_convbn.command.results import TITLES, Block, Measurement, Variant
from lightning_convbn.command.trade_off import as_svg, points_of
from lightning_convbn.memory.use import MIB


def render_report(
    title: str, found: Measurement, *, facts: str, notes: Sequence[str], command: str, versions: str, budget: str
) -> str:
    """Return the page as HTML. All texts are escaped, and the browser runs no script but the page's own.

    Args:
        title: What was measured.
        found: What was found.
        facts: Input, device and number of folded BatchNorms, in one line.
        notes: Sentences that explain the numbers and say what could not be measured.
        command: The command that was typed.
        versions: The versions that were used.
        budget: The budget as it was typed. Empty if there was none.
    """
    template = (files("lightning_convbn.command") / "html_report.html").read_text(encoding="utf-8")
    variants = list(found.variants)
    points = points_of(found)
    (script,) = re.findall(r"<script>(.*)</script>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(template).substitute(
        script_hash=f"sha256-{digest}",
        title=escape(title),
        facts=escape(facts),
        cards="\n".join(_card(variant, found, budget) for variant in variants),
        trade_off=as_svg(points) if points else "",
        legend="".join(f'<li class="{variant}">{TITLES[variant]}</li>' for variant in variants),
        columns=_columns(variants),
        blocks=_rows(found.blocks, variants),
        sections=_rows(sum_by_section(found.blocks, variants), variants),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes),
        command=escape(command),
        versions=escape(versions),
    )


def _card(variant: Variant, found: Measurement, budget: str) -> str:
    """Return the box with the numbers of one variant."""
    result, change, ratio = found.variants[variant], found.kept_change(variant), found.step_time_ratio(variant)
    details = []
    if change is not None:
        details.append(("Kept, against Eval", f"{change:+.1f} %".replace("-", "−")))
    if result.peak_bytes is not None:
        details.append(("Peak of a step", f"{result.peak_bytes / MIB:,.1f} MiB"))
    peak_change = found.peak_change(variant)
    if peak_change is not None:
        details.append(("Peak, against Eval", f"{peak_change:+.1f} %".replace("-", "−")))
    if result.peak_allocated_bytes is not None:
        details.append(("Peak of the allocator", f"{result.peak_allocated_bytes / MIB:,.1f} MiB"))
    if result.median_seconds is not None and variant == "eval":
        details.append(("Step time", f"{1000 * result.median_seconds:,.1f} ms"))
    if ratio is not None and variant != "eval":
        details.append(("Step time / Eval’s", f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})"))
    if result.largest_batch is not None:
        details.append((f"Largest batch in {budget}", f"{result.largest_batch:,}"))
    rows = "".join(f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in details)
    kept = f'<p class="kept">{result.saved_bytes / MIB:,.1f}<small>MiB kept</small></p>'
    return f'<article class="card {variant}"><h3>{TITLES[variant]}</h3>{kept}<dl>{rows}</dl></article>'


def _columns(variants: Sequence[Variant]) -> str:
    """Return the header of the table. A click on a header sorts by its column."""
    order = '<th role="columnheader" scope="col" aria-sort="ascending"><button type="button">Block</button></th>'
    bars = '<th class="bars" aria-hidden="true"></th>'
    titles: dict[str, str] = {variant: TITLES[variant] for variant in variants}
    if len(variants) > 1:
        titles["saved"] = "Saved"
    sizes = [
        f'<th class="{name}" role="columnheader" scope="col" data-first="descending">'
        f'<button type="button">{title}</button></th>'
        for name, title in titles.items()
    ]
    return "".join([order, bars, *sizes])


def _rows(blocks: Sequence[Block], variants: Sequence[Variant]) -> str:
    longest = max((size for block in blocks for size in block.saved_bytes.values()), default=0) or 1
    return "\n".join(_row(number, block, variants, longest) for number, block in enumerate(blocks))


def _row(number: int, block: Block, variants: Sequence[Variant], longest: int) -> str:
    sizes = block.saved_bytes
    bars = "".join(
        f'<div class="bar {variant}" style="width:{100 * sizes[variant] / longest:.2f}%"></div>' for variant in variants
    )
    cells = [
        f'<td role="cell" data-label="{TITLES[variant]}" data-value="{sizes[variant]}">{_mib(sizes[variant])}</td>'
        for variant in variants
    ]
    lines = [block.name, block.about, *(f"{TITLES[variant]}: {sizes[variant]:,} bytes" for variant in variants)]
    if len(variants) > 1:
        saved = sizes["eval"] - sizes[variants[1]]
        cells.append(f'<td role="cell" class="saved" data-label="Saved" data-value="{saved}">{_mib(saved)}</td>')
        if sizes["eval"]:
            lines.append(f"{TITLES[variants[1]]} saves {100 * saved / sizes['eval']:.0f} %")
    return (
        f'<tr role="row" tabindex="-1" data-tip="{escape(chr(10).join(lines))}">'
        f'<th role="rowheader" scope="row" data-value="{number}">{escape(block.name)}</th>'
        f'<td class="bars" aria-hidden="true">{bars}</td>{"".join(cells)}</tr>'
    )


def _mib(size: int) -> str:
    """Return a size in MiB with enough digits to compare. A small size that is not zero does not become zero."""
    if size and abs(size) < MIB / 100:
        return "&lt;0.01" if size > 0 else "&gt;−0.01"
    digits = 1 if round(abs(size) / MIB, 2) >= 1 else 2
    return f"{size / MIB:,.{digits}f}".replace("-", "−") if size else "0"
