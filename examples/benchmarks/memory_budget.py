"""Fine-tune with a template under a budget of half of Eval's peak, and ask the system for the process's own peak.

    python examples/benchmarks/memory_budget.py

Each run is a process of its own: Eval and Tune mode without recomputation, and Tune mode under the budget. Eval's peak
is what a plan predicts: parameters, buffers, gradients, optimizer and the peak of a step. The process's peak is the
most resident memory that the system has seen: Python, its libraries and the images are in it, too. The results go to
`docs/benchmarks/memory_budget.json`, and as a table to `docs/use/memory-budget.md`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples import results_file
from lightning_convbn import Mode
from lightning_convbn.memory import MIB

SHARE = 0.5
RESULTS = results_file.BENCHMARKS / "memory_budget.json"
PAGE = results_file.ROOT / "docs" / "use" / "memory-budget.md"
MARK = "memory-budget"
TEMPLATE = results_file.ROOT / "examples" / "templates" / "classification.py"
UNLIMITED = "1TiB"  # no recomputation is needed; the peak is predicted all the same


def main() -> None:
    """Run, write the JSON, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of the template, last")
    arguments = parser.parse_args()
    chosen = [f"--data.batch_size={arguments.batch_size}", f"--trainer.max_epochs={arguments.epochs}"]
    evaluated = fit("eval", UNLIMITED, [*chosen, *arguments.options])
    budget = f"{SHARE * evaluated['predicted_peak_mib']:.1f}MiB"
    rows = [evaluated, *(fit("tune", amount, [*chosen, *arguments.options]) for amount in (UNLIMITED, budget))]
    lines = table(rows)
    print(*lines, sep="\n")
    facts = {
        "machine": results_file.machine(torch.device("cpu")),
        "settings": {"batch_size": arguments.batch_size, "share": SHARE, "options": arguments.options},
    }
    print(results_file.write_json(arguments.out, rows, ("torch", "torchvision", "lightning"), **facts))
    if arguments.out == RESULTS:
        results_file.fill(PAGE, {MARK: lines})


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw a table of the runs."""
    lines = []
    for row in rows:
        peaks = [f"{row[f'{what}_peak_mib']:.0f} MiB" for what in ("predicted", "process")]
        lines.append([row["mode"].title(), row["memory_budget"] or "-", *peaks, f"{row['test_acc']:.4f}"])
    header = ["mode", "budget", "predicted peak", "peak of the process", "test accuracy"]
    return results_file.markdown_table(header, lines)


def fit(mode: Mode, memory_budget: str, options: Sequence[str]) -> dict[str, Any]:
    """Run the template in a process of its own.

    Returns:
        The mode, the budget, the predicted and the process's peak in MiB, and the test scores.
    """
    with tempfile.TemporaryDirectory() as folder:
        logger = [
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
            f"--trainer.logger.save_dir={folder}",
            "--trainer.logger.version=run",
            "--trainer.logger.name=logs",
            "--trainer.accelerator=cpu",
        ]
        command = [sys.executable, str(TEMPLATE), "fit", f"--results={folder}/scores.json", *logger, *options]
        command += [f"--convbn.mode={mode}", f"--convbn.memory_budget={memory_budget}", "--convbn.eval_mode=eval"]
        paths = os.pathsep.join([str(results_file.ROOT), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"the template failed: {' '.join(command)}")
        with (Path(folder) / "logs" / "run" / "metrics.csv").open() as file:
            planned = [row for row in csv.DictReader(file) if row.get("convbn/predicted_peak_mib")]
        if not planned:
            raise SystemExit(f"the template has logged no plan: {' '.join(command)}")
        (scores,) = json.loads((Path(folder) / "scores.json").read_text())["rows"]
    return {
        "mode": mode,
        "memory_budget": None if memory_budget == UNLIMITED else memory_budget,
        "predicted_peak_mib": round(float(planned[-1]["convbn/predicted_peak_mib"]), 1),
        "process_peak_mib": round(usage.ru_maxrss * 1024 / MIB, 1),
        **{name: round(float(value), 4) for name, value in scores.items()},
    }


if __name__ == "__main__":
    main()
