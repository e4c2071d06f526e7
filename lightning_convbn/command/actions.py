"""What ``lightning-convbn inspect``, ``measure`` and ``export`` do with their options."""

from __future__ import annotations

import json
import platform
import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_convbn.command.errors import CommandError, first_line
from lightning_convbn.command.html_report import render_page
from lightning_convbn.command.measurement import (
    TITLES,
    Measurement,
    Subject,
    Variant,
    check_has_norms,
    check_takes,
    count_norms,
    count_stages,
    dtype_name,
)
from lightning_convbn.command.model_argument import load_model
from lightning_convbn.command.plot import check_plottable, write_plot
from lightning_convbn.command.terminal import print_notes, print_table, progress_bar
from lightning_convbn.exporting.checked_file import check_path
from lightning_convbn.exporting.deploy_copy import export
from lightning_convbn.exporting.whole_file import check_writable, written_whole
from lightning_convbn.memory import as_mib
from lightning_convbn.pairs.find import find_conv_bn_pairs
from lightning_convbn.pairs.pair import ConvBNPairs

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
WHAT_IS_COMPARED = (
    "Eval and Tune are modes of the model. The Deploy copy is the plain copy that fuse_for_deploy makes, trained as it "
    "is: there to compare with, as training it is unstable."
)
BUDGET_HOLDS = (
    "The budget holds the parameters, one gradient for each that wants one, the buffers, and what one forward pass "
    "keeps for the backward pass. Not in it: the optimizer's state, temporary memory during the passes, workspaces of "
    "cuDNN and the like, the CUDA context, fragmentation."
)
OF_DETECTORS = (
    "torchvision gives its detectors FrozenBatchNorm2d where it loads pretrained weights, and Eval mode keeps less of "
    "it; built without weights, as here, most have BatchNorm2d."
)


def inspect_model(options: Namespace) -> None:
    """Print what becomes of every BatchNorm, and why."""
    example = None if options.size is None else torch.randn(2, *_sample(options.size))
    _check_outputs(options)
    model = load_model(options.model, options.checkpoint_class)
    check_has_norms(model)
    if example is not None:
        check_takes(model, example)
    pairs = find_conv_bn_pairs(model, example_inputs=None if example is None else (example,))
    unfrozen = {bn: reason for bn, reason in pairs.unpaired.items() if bn in pairs.unfrozen}
    if options.json != "-":
        rows = [("folded", pair.bn, f"into {pair.conv}") for pair in pairs]
        rows += [("frozen", bn, reason) for bn, reason in pairs.frozen.items()]
        rows += [("unfrozen", bn, reason) for bn, reason in unfrozen.items()]
        print_table(("state", "BatchNorm", "how or why"), rows)
        print(f"\n{_folded(pairs)}, {len(pairs.frozen)} frozen, {len(unfrozen)} unfrozen")
        if _is_detector(model):
            print_notes([OF_DETECTORS])
    _write_json(
        options,
        batchnorms=count_norms(pairs),
        folded=[pair._asdict() for pair in pairs],
        frozen=pairs.frozen,
        unfrozen=unfrozen,
    )


def measure_model(options: Namespace) -> None:
    """Measure memory and time, print them, and write what was asked for."""
    shape = (options.batch_size, *_sample(options.size))
    budget = None if options.budget is None else _bytes(options.budget)
    device = _device(options.device)
    if options.plot is not None:
        check_plottable(options.plot)
    _check_outputs(options)
    model = load_model(options.model, options.checkpoint_class)
    stages = count_stages(options.modes, rounds=options.rounds, budget=budget)
    with _refused_in_one_line(), progress_bar(stages) as progress:
        subject = Subject(model, shape, DTYPES[options.dtype], device)
        found = subject.measure(options.modes, rounds=options.rounds, budget=budget, progress=progress)
    notes = _notes(options, found) + ([OF_DETECTORS] if _is_detector(model) else [])
    if options.json != "-":
        print(f"{options.model}: {_facts(found)}\n{_folded(found.pairs)}\n")
        _print_figures(options, found)
        print()
        print_notes(notes)
    _write_json(options, rounds=options.rounds, budget_bytes=budget, **found.as_dict())
    if options.plot is not None:
        with _written(options.plot) as path:
            write_plot(path, f"{options.model}, {_facts(found)}", found)
    if options.html is not None:
        page = render_page(
            options.model,
            found,
            facts=f"{_facts(found)} · {_folded(found.pairs)}",
            notes=notes,
            command=options.typed,
            versions=", ".join(f"{name} {number}" for name, number in _versions().items()),
            budget=options.budget or "",
        )
        with _written(options.html) as path:
            path.write_text(page, encoding="utf-8")


def export_model(options: Namespace) -> None:
    """Write the Deploy copy, proven equal to Eval mode."""
    example = torch.randn(options.batch_size, *_sample(options.size))
    with _refused_in_one_line():
        check_path("PATH", options.path)
    model = load_model(options.model, options.checkpoint_class)
    check_has_norms(model)
    check_takes(model, example)
    if options.model.startswith(("torchvision:", "timm:")):
        _say(f"{options.model} has random weights; a factory of your own or a checkpoint has trained ones")
    with _refused_in_one_line():
        export(model, options.path, (example,), dynamic_batch=not options.static_batch)
    print(f"wrote {options.path}: read back, it computes what {options.model} computes in Eval mode")


def installed(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "(not installed)"


def _print_figures(options: Namespace, found: Measurement) -> None:
    peak = any(figures.peak_allocated_bytes is not None for figures in found.figures.values())
    columns = ["mode", "kept for backward", "against Eval"]
    columns += ["peak"] * peak
    columns += ["step time", "ratio to Eval (rounds)"] if options.rounds else []
    columns += [f"largest batch in {options.budget}"] if options.budget else []
    rows = []
    for variant, figures in found.figures.items():
        row = [TITLES[variant], as_mib(figures.saved_bytes), _change(variant, found)]
        if peak:
            row.append("-" if figures.peak_allocated_bytes is None else as_mib(figures.peak_allocated_bytes))
        if options.rounds:
            ratio = found.step_time_ratio(variant)
            row.append("-" if figures.median_seconds is None else f"{1000 * figures.median_seconds:.1f} ms")
            row.append("-" if ratio is None else f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})")
        if options.budget:
            row.append("-" if figures.largest_batch is None else str(figures.largest_batch))
        rows.append(row)
    print_table(columns, rows, numbers=columns[1:])


def _change(variant: Variant, found: Measurement) -> str:
    own, reference = found.figures[variant].saved_bytes, found.figures["eval"].saved_bytes
    return f"{100 * (own / reference - 1):+.1f} %" if variant != "eval" and reference else "-"


def _notes(options: Namespace, found: Measurement) -> list[str]:
    """What the figures mean, for those figures that there are."""
    notes = [
        "Kept for backward: counted, of one forward pass in the model's eval state, parameters and buffers excluded.",
        WHAT_IS_COMPARED,
    ]
    if options.rounds:
        noisy = "" if found.device.type == "cuda" else f", on {torch.get_num_threads()} CPU thread(s), which is noisy"
        notes.append(
            f"Step time: forward and backward without an optimizer's step, the median of {options.rounds} interleaved "
            f"rounds, with the smallest and the largest ratio of a round{noisy}."
        )
    if any(figures.peak_allocated_bytes is not None for figures in found.figures.values()):
        notes.append("Peak: the most that forward and backward allocate beyond parameters and input.")
    if options.budget:
        notes.append(BUDGET_HOLDS)
    return notes + found.notes


def _is_detector(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection.")


def _facts(found: Measurement) -> str:
    batch, *sample = found.shape
    device = torch.cuda.get_device_name(found.device) if found.device.type == "cuda" else str(found.device)
    return f"batch {batch}, {' × '.join(map(str, sample))}, {dtype_name(found.dtype)}, {device}"


def _folded(pairs: ConvBNPairs) -> str:
    return f"{len(pairs)} of {len(pairs) + len(pairs.unpaired)} BatchNorms folded"


def _sample(size: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise CommandError(
            f"--size {size!r} is neither a number of pixels, as 224, nor a shape without batch, as 1x28x28"
        )
    sizes = tuple(map(int, size.split("x")))
    return (3, *sizes, *sizes) if len(sizes) == 1 else sizes


def _bytes(budget: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]+)", budget.strip().upper())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise CommandError(f"--budget {budget!r} is no amount of memory, as 8GiB, 500MiB or 24GB")
    return int(float(match[1]) * UNITS[match[2]])


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except Exception as error:  # PyTorch raises differently for unknown, missing and unsupported devices
        raise CommandError(f"--device {name!r} can't be used: {first_line(error)}") from error


@contextmanager
def _refused_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise CommandError(first_line(error)) from error


def _check_outputs(options: Namespace) -> None:
    for name in ("json", "plot", "html"):
        path = getattr(options, name, None)
        if path is not None and path != "-":
            with _refused_in_one_line():
                check_writable(f"--{name} {path}", Path(path))


def _write_json(options: Namespace, **content: Any) -> None:
    if options.json is None:
        return
    text = json.dumps({"model": options.model, "command": options.typed, "versions": _versions(), **content}, indent=1)
    if options.json == "-":
        print(text)
        return
    with _written(Path(options.json)) as path:
        path.write_text(f"{text}\n", encoding="utf-8")


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    try:
        with written_whole(path) as temporary:
            yield temporary
    except OSError as error:
        raise CommandError(f"{path} was not written: {error.strerror or error}") from error
    _say(f"wrote {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _versions() -> dict[str, str]:
    used = ("torch", "torchvision", "timm")
    numbers = {package: installed(package) for package in used if package in sys.modules}
    return {"lightning-convbn": installed("lightning-convbn"), "python": platform.python_version(), **numbers}
