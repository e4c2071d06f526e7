"""``lightning-convbn measure``: measures memory and time, and writes what was asked for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from textwrap import fill
from typing import Any

from torch import nn

from lightning_convbn.command.counting_and_timing import ModelMeasurer, count_progress_steps
from lightning_convbn.command.errors import errors_in_one_line
from lightning_convbn.command.html_report import render_report
from lightning_convbn.command.input_options import INPUT_HELP, add_input, default_inputs, read_inputs
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.notes_below_tables import (
    WHAT_IS_COMPARED,
    WHAT_THE_BUDGET_HOLDS,
    folded_count,
    input_facts,
    notes_on,
    notes_on_model,
)
from lightning_convbn.command.option_values import DTYPES, budget_bytes, chosen_device
from lightning_convbn.command.output_files import STDOUT, check_output_files, output_file, write_json
from lightning_convbn.command.plot import check_plottable, write_plot
from lightning_convbn.command.results import TITLES, VARIANTS, Measurement, Variant
from lightning_convbn.command.shared_options import add_command, add_json, not_negative
from lightning_convbn.command.terminal import print_notes, print_table, progress_bar
from lightning_convbn.command.versions import used_versions
from lightning_convbn.memory.optimizers import OPTIMIZERS
from lightning_convbn.memory.use import as_mib

EXAMPLES = """\
examples:
  lightning-convbn measure torchvision:resnet50 --batch-size 32
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB      (only counts: no data, no waiting)
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB --optimizer adamw --freeze conv1 layer1
  lightning-convbn measure my_project.models:two_inputs --input image=8x3x224x224 --input depth=8x1x224x224
  lightning-convbn measure timm:efficientnet_b0 --html report.html --plot report.png
"""


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    notes = "\n".join(fill(note, 110) for note in (WHAT_IS_COMPARED, WHAT_THE_BUDGET_HOLDS))
    parser = add_command(
        commands,
        "measure",
        "measure memory and time in Eval mode, in Tune mode, and of the Deploy copy",
        f"{EXAMPLES}\n{INPUT_HELP}\n\n{notes}",
    )
    add_input(parser, batch=8)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        help="what to measure; eval is always measured, to compare with; default: all",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of model and input; default: %(default)s"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda if there is a CUDA device, else cpu")
    parser.add_argument(
        "--rounds",
        type=not_negative,
        default=7,
        help="how many steps to time for each variant, interleaved; default: 7; 0 times nothing",
    )
    parser.add_argument("--budget", help="find the largest batch whose step fits into this memory: 8GiB, 500MB")
    parser.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="none",
        help="the optimizer that is in the peak and in the budget: its state and its step; default: %(default)s",
    )
    parser.add_argument(
        "--freeze",
        nargs="+",
        default=(),
        metavar="PREFIX",
        help="modules or parameters that want no gradients, as conv1 layer1; the peaks without that are noted",
    )
    add_json(parser)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw what each section of the model keeps: .png, .svg, .pdf"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page with every block")
    parser.set_defaults(run=measure_model)


def measure_model(options: Namespace) -> None:
    """Measure memory and time. Print a table or JSON, and write the files that were asked for."""
    inputs = read_inputs(options)
    budget = None if options.budget is None else budget_bytes(options.budget)
    device = chosen_device(options.device)
    if options.plot is not None:
        check_plottable(options.plot)
    check_output_files(options)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    inputs = inputs or default_inputs(options, model)
    if budget is not None:
        inputs.check_batch(f"--budget {options.budget}")
    chosen: dict[str, Any] = {"optimizer": options.optimizer, "freeze": options.freeze}
    steps = count_progress_steps(options.variants, rounds=options.rounds, budget=budget)
    with errors_in_one_line(), progress_bar(steps) as progress:
        measurer = ModelMeasurer(model, inputs, DTYPES[options.dtype], device, **chosen)
        found = measurer.measure(options.variants, rounds=options.rounds, budget=budget, progress=progress)
    _write(options, found, model, budget)


def _write(options: Namespace, found: Measurement, model: nn.Module, budget: int | None) -> None:
    notes = notes_on(found, rounds=options.rounds, has_budget=budget is not None) + notes_on_model(model)
    facts = input_facts(found.inputs, found.dtype, found.device)
    if options.json != STDOUT:
        print(f"{options.model}: {facts}\n{folded_count(found.pairs)}\n")
        _print_results(options, found)
        print()
        print_notes(notes)
    write_json(options, rounds=options.rounds, budget_bytes=budget, **found.as_dict())
    if options.plot is not None:
        with output_file(options.plot) as path:
            write_plot(path, f"{options.model}, {facts}", found)
    if options.html is not None:
        report = render_report(
            options.model,
            found,
            facts=f"{facts} · {folded_count(found.pairs)}",
            notes=notes,
            command=options.typed,
            versions=", ".join(f"{name} {number}" for name, number in used_versions().items()),
            budget=options.budget or "",
        )
        with output_file(options.html) as path:
            path.write_text(report, encoding="utf-8")


def _print_results(options: Namespace, found: Measurement) -> None:
    """Print a row for each variant. A column is left out if nothing was measured for it."""
    was_allocated = any(result.peak_allocated_bytes is not None for result in found.variants.values())
    columns = ["variant", "kept for backward", "against Eval", "peak of a step", "against Eval"]
    columns += ["peak of the allocator"] if was_allocated else []
    columns += ["step time", "ratio to Eval (rounds)"] if options.rounds else []
    columns += [f"largest batch in {options.budget}"] if options.budget else []
    rows = []
    for variant in found.variants:
        row = _memory_cells(variant, found, was_allocated=was_allocated)
        row += _time_cells(variant, found) if options.rounds else []
        if options.budget:
            largest = found.variants[variant].largest_batch
            row.append("-" if largest is None else str(largest))
        rows.append(row)
    print_table(columns, rows, numbers=columns[1:])


def _memory_cells(variant: Variant, found: Measurement, *, was_allocated: bool) -> list[str]:
    result = found.variants[variant]
    cells = [TITLES[variant], as_mib(result.saved_bytes), _percent(found.kept_change(variant))]
    cells += [_size(result.peak_bytes), _percent(found.peak_change(variant))]
    return [*cells, _size(result.peak_allocated_bytes)] if was_allocated else cells


def _size(size: int | None) -> str:
    return "-" if size is None else as_mib(size)


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{change:+.1f} %"


def _time_cells(variant: Variant, found: Measurement) -> list[str]:
    seconds, ratio = found.variants[variant].median_seconds, found.step_time_ratio(variant)
    return [
        "-" if seconds is None else f"{1000 * seconds:.1f} ms",
        "-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})",
    ]
