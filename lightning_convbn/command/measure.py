"""``lightning-convbn measure``: measures memory and time, and writes what was asked for."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from lightning_convbn.command.counting_and_timing import ModelMeasurer
from lightning_convbn.command.errors import errors_in_one_line
from lightning_convbn.command.html_report import check_plotly, write_report
from lightning_convbn.command.inspect import folded_count, input_facts
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.options import add_command, add_json, budget, device, inputs_for, whole_number
from lightning_convbn.command.output_files import STDOUT, check_output_files, output_file, write_json
from lightning_convbn.command.plot import check_plottable, write_plot
from lightning_convbn.command.results import VARIANTS, Measurement
from lightning_convbn.command.terminal import print_status, print_table
from lightning_convbn.memory.optimizers import OPTIMIZERS

EXAMPLES = """\
  lightning-convbn measure torchvision:resnet50 --batch-size 32
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB      (only counts: no data, no waiting)
  lightning-convbn measure torchvision:resnet50 --variants train-elementwise train-blocks
  lightning-convbn measure torchvision:resnet50 --rounds 0 --budget 8GiB --optimizer adamw --freeze conv1 layer1
  lightning-convbn measure my_project.models:two_inputs --input image=8x3x224x224 --input depth=8x1x224x224
  lightning-convbn measure timm:efficientnet_b0 --html report.html --plot report.png
"""
DTYPES = ("float32", "float64", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Add the sub-command and its options to the parser."""
    purpose = "measure memory and time in Train, Eval and Tune mode, and of the Deploy copy"
    parser = add_command(commands, "measure", purpose, EXAMPLES, batch=8)
    add = parser.add_argument
    variants = "what to measure; train or eval is added, to compare with; default: all"
    add("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help=variants)
    add("--dtype", choices=DTYPES, default="float32", help="dtype of model and input; default: %(default)s")
    add("--device", type=device, help="cpu, cuda, cuda:1; default: cuda if there is a CUDA device, else cpu")
    rounds = "how many steps to time for each variant, interleaved; default: 7; 0 times nothing"
    add("--rounds", type=whole_number(at_least=0), default=7, metavar="N", help=rounds)
    add("--budget", type=budget, help="find the largest batch whose step fits into this memory: 8GiB, 500MB")
    optimizer = "the optimizer whose state and step are in the peak; default: %(default)s"
    add("--optimizer", choices=OPTIMIZERS, default="none", help=optimizer)
    freeze = "modules or parameters that want no gradients, as conv1 layer1"
    add("--freeze", nargs="+", default=(), metavar="PREFIX", help=freeze)
    add_json(parser)
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw peak against step time, and the largest blocks: .png, .svg, .pdf",
    )
    add("--html", type=Path, metavar="FILE", help="write one page with every block, which needs no network")
    parser.set_defaults(run=measure_model)


def measure_model(options: Namespace) -> None:
    """Measure memory and time. Print a table or JSON, and write the files that were asked for."""
    if options.plot is not None:
        check_plottable(options.plot)
    if options.html is not None:
        check_plotly()
    check_output_files(options)
    model = load_model(options.model, options.checkpoint_class, options.trust_checkpoint)
    inputs = inputs_for(model, options)
    if options.budget is not None:
        inputs.check_batch("--budget")
    on = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    with errors_in_one_line():
        measurer = ModelMeasurer(model, inputs, dtype, on, optimizer=options.optimizer, freeze=options.freeze)
        found = measurer.measure(options.variants, rounds=options.rounds, budget=options.budget)
    _write(options, found)


def _write(options: Namespace, found: Measurement) -> None:
    facts = [input_facts(found.inputs, found.dtype, found.device), folded_count(found.pairs)]
    notes = _notes(options, found)
    if options.json != STDOUT:
        print(f"{options.model}: {', '.join(facts)}\n")
        print_table(*found.as_table())
        print("\n" + "\n".join(notes))
    for note in found.notes:
        print_status(note)
    write_json(options, rounds=options.rounds, budget_bytes=options.budget, **found.as_dict())
    if options.plot is not None:
        with output_file(options.plot) as path:
            write_plot(path, f"{options.model}, {facts[0]}", found)
    if options.html is not None:
        with output_file(options.html) as path:
            write_report(path, options.model, [*facts, *notes, *found.notes, options.typed], found)


def _notes(options: Namespace, found: Measurement) -> list[str]:
    """Return at most four lines that explain the numbers."""
    peak = f"Peak: input, both passes, gradients, optimizer ({found.optimizer}); without workspaces."
    notes = [f"Bytes beyond parameters and buffers. {peak}"]
    if "train" in found.variants:
        notes.append("Train: statistics of the batch, dropout and auxiliary heads on. All others: frozen statistics.")
    if "deploy-copy" in found.variants:
        notes.append("The Deploy copy is only there to compare with: training it is unstable.")
    if options.rounds:
        noise = f" On {torch.get_num_threads()} CPU thread(s): expect noise." if found.device.type == "cpu" else ""
        notes.append(f"Step time: median of {options.rounds} interleaved rounds, without an optimizer.{noise}")
    return notes
