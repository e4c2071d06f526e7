"""Measure training steps in every mode, and with other tools: kept bytes, peak memory, step time, gradients.

    python examples/benchmarks/all_modes.py --out docs/benchmarks/modes.json
    python examples/benchmarks/all_modes.py --models resnet50 timm:hrnet_w18 --sizes 1:224 8:224 --out mine.json

A cell is a network and a batch size. All variants of a cell run in one process. First each is warmed up, and its bytes
(as the allocator counts them) and its gradients (compared with those of Eval) are measured. Then all are timed in
interleaved rounds, so that other work on the machine slows down all alike. A step is forward, mean of the outputs,
backward, and gradients set to None. All parameters are trained; there is no optimizer. If a variant fails, the results
hold its error. The JSON file is written after each cell, and the cells that it holds are not run again.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples import results_file
from examples.benchmarks.networks import DETECTOR, MODELS, Workload, build, workload
from examples.benchmarks.summary import SETTING, cell_table, title
from examples.benchmarks.training_step import Step, deviation
from examples.benchmarks.variants import INDUCTOR_PASS, VARIANTS, folded_by_inductor, forget_compiled
from lightning_convbn.command.errors import CommandError
from lightning_convbn.command.results import count_batchnorms
from lightning_convbn.exporting.atomic_file import check_writable
from lightning_convbn.memory.budget import fixed_bytes
from lightning_convbn.text import first_line

SIZES = {"cpu": ["1:224", "8:224", "32:96"], "cuda": ["1:224", "8:224", "32:224"]}
REFERENCES = ("eval", "deploy")
REPLAYS = 5
PACKAGES = ("torch", "torchvision", "timm", "mmengine")


def main() -> None:
    """Measure cell by cell, and write the JSON after each."""
    parser = _parser()
    arguments = parser.parse_args()
    try:
        sizes = [_size(text) for text in arguments.sizes or SIZES[arguments.device]]
        _check(arguments)
        before = _read(arguments.out)
        facts = _facts(arguments)
        _check_alike(arguments.out, before, facts)
    except (CommandError, ValueError) as error:
        parser.error(str(error))
    warnings.simplefilter("ignore")  # from compilers, about what they can't fuse
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints between the tables
    rows: list[dict[str, Any]] = before.get("rows", [])
    commands = [*before.get("commands", []), results_file.command()]
    cells = [(name, *size) for name in arguments.models for size in sizes]
    for number, (name, batch, pixels) in enumerate(cells, start=1):
        values = (name, batch, pixels, arguments.device, arguments.precision, arguments.channels_last)
        setting: dict[str, Any] = dict(zip(SETTING, values, strict=True))
        print(f"[{number}/{len(cells)}] {name}, {title(setting)}", end=": ", flush=True)
        if any(_is_finished(row, setting, arguments.variants) for row in rows):
            print(f"already in {arguments.out}")
            continue
        row = measure(setting, arguments.variants, arguments.rounds)
        rows = [other for other in rows if any(other[key] != setting[key] for key in SETTING)] + [row]
        results_file.write_json(
            arguments.out, rows, _installed(), commands=list(dict.fromkeys(commands)), **facts["written"]
        )
        print(f"{row['seconds']:.0f} s", *cell_table(row), "", sep="\n", flush=True)
    print(f"{len(rows)} cells in {arguments.out}")


def measure(setting: dict[str, Any], variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure one cell.

    Args:
        setting: A value for each key in `SETTING`.
        variants: Names in `VARIANTS`.
        rounds: How often each variant is timed.

    Returns:
        The setting and, for each variant, its measurements or its error.
    """
    started = time.perf_counter()
    device = torch.device(setting["device"])
    forget_compiled()
    work = workload(setting["model"], setting["batch"], setting["pixels"], device, setting["channels_last"])
    results: dict[str, dict[str, Any]] = {}
    running: dict[str, Step] = {}
    expected: dict[str, Tensor] = {}
    for name in variants:
        try:
            step = Step(work, VARIANTS[name].build(work), device, setting["precision"])
            results[name] = _measure_alone(step, name, work, expected)
            running[name] = step
        except Exception as error:  # any error of a tracer, a compiler or an allocator is the result
            results[name] = _failure(error)
    _time(running, results, rounds)
    row = {
        **setting,
        "batchnorms": count_batchnorms(work.pairs),
        "checkpointed": work.stages,
        "compiled_part": work.part or "(all)",
        "rounds": rounds,
        "seconds": round(time.perf_counter() - started, 1),
        "variants": results,
    }
    del step, running, expected, work
    forget_compiled()
    gc.collect()
    return row


def _measure_alone(step: Step, name: str, work: Workload, expected: dict[str, Tensor]) -> dict[str, Any]:
    """Measure all but the step time. The first variant, Eval, also sets the expected gradients."""
    first = step.seconds()
    found: dict[str, Any] = {"first_step_s": round(first, 3), **step.memory()}
    found["resident_bytes"] = fixed_bytes(step.model)
    gradients = step.gradients()
    if name == "eval":
        expected.update(gradients)
    if VARIANTS[name].folded_weights:  # folded weights have other gradients
        folded = tuple(f"{module}." for pair in work.pairs for module in pair)
        gradients = {name: gradient for name, gradient in gradients.items() if not name.startswith(folded)}
    off = deviation(gradients, expected) if VARIANTS[name].has_evals_gradients else None
    found["gradient_deviation"] = None if off is None else float(f"{off:.3g}")
    if name == INDUCTOR_PASS:
        found["note"] = f"folded {folded_by_inductor()} of {len(work.pairs)} blocks"
    detects = work.training  # a captured graph can't branch by values
    if step.device.type == "cuda" and not VARIANTS[name].compiled and not detects:
        try:
            found["replay_ms"] = [round(1000 * seconds, 3) for seconds in step.replay_seconds(REPLAYS)]
        except RuntimeError as error:
            found["note"] = f"can't be captured: {first_line(error)}"
    return found


def _time(running: dict[str, Step], results: dict[str, dict[str, Any]], rounds: int) -> None:
    """Time steps in interleaved rounds, each in an order of its own; the first round warms up.

    The step before changes the state of the heap, so the order of the variants can change a time by several percent.
    """
    for name in running:
        results[name]["step_ms"] = []
    shuffled = random.Random(0)
    for number in range(rounds + 1):
        for name in shuffled.sample(list(running), len(running)):
            try:
                seconds = running[name].seconds()
            except Exception as error:  # as when it is measured alone
                results[name] = _failure(error)
                del running[name]
            else:
                if number:
                    results[name]["step_ms"].append(round(1000 * seconds, 3))


def _failure(error: Exception) -> dict[str, Any]:
    return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _is_finished(row: dict[str, Any], setting: dict[str, Any], variants: Sequence[str]) -> bool:
    return all(row[key] == setting[key] for key in SETTING) and set(variants) <= set(row["variants"])


def _size(text: str) -> tuple[int, int]:
    batch, colon, pixels = text.partition(":")
    if not (colon and batch.isdecimal() and pixels.isdecimal() and int(batch) and int(pixels)):
        raise ValueError(f"--sizes {text}: must be BATCH:PIXELS, two numbers above 0, as in 8:224")
    return int(batch), int(pixels)


def _check(arguments: argparse.Namespace) -> None:
    """Raise an error for wrong arguments before anything is measured."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU on this machine; use --device cpu")
    for name, least in (("rounds", 1), ("threads", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    for name in arguments.models:
        if name not in MODELS:
            build(name)
    check_writable(f"--out {arguments.out}", arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    # Eval comes first, since the others are compared with its gradients.
    asked = set(arguments.variants) | set(REFERENCES)
    arguments.variants = sorted(asked, key=lambda name: (name != "eval", list(VARIANTS).index(name)))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        assert all(key in row for row in found["rows"] for key in (*SETTING, "variants"))
    except (AssertionError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--out {path}: exists and is no file of this benchmark; name another one") from error
    return found


def _installed() -> list[str]:
    return [name for name in PACKAGES if find_spec(name) is not None]


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    machine = results_file.machine(torch.device(arguments.device))
    return {
        "compared": {"machine": machine, "versions": results_file.versions(_installed())},
        "written": {"machine": machine},
    }


def _check_alike(path: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuse a file that was measured on another machine or with other versions."""
    for what, now in facts["compared"].items():
        if before and (then := before.get(what)) != now:
            raise ValueError(f"--out {path}: was measured with {what} {then}, this is {now}; name another file")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=MODELS,
        metavar="NAME",
        help=f"torchvision's names, timm:NAME, package.module:factory, or {DETECTOR}; default: {' '.join(MODELS)}",
    )
    parser.add_argument(
        "--sizes", nargs="+", metavar="BATCH:PIXELS", help=f"default: {SIZES['cpu']}, with cuda {SIZES['cuda']}"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=list(VARIANTS),
        metavar="NAME",
        help=f"any of {' '.join(VARIANTS)}; {' and '.join(REFERENCES)} are run in any case",
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each variant is timed")
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast")
    parser.add_argument("--channels-last", action="store_true", help="use this memory format for images and weights")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument(
        "--out", type=Path, required=True, help="the JSON file; the cells that it holds are not measured again"
    )
    return parser


if __name__ == "__main__":
    main()
