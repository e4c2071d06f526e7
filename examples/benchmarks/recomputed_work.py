"""How long does it take to compute again what ``recompute="elementwise"`` does not keep? A floor for its step time.

    python examples/benchmarks/recomputed_work.py

Steps of Tune mode without and with recomputation take turns. In the latter, two things are timed: functions that the
backward pass calls again, and what packs bits and indices and unpacks them. Nothing else is: no bookkeeping, no search
for what to keep. If those calls alone take 8 % of a step without recomputation, then no way to arrange them makes the
step less than 8 % longer, unless it calls less often. The results go to
`docs/benchmarks/recomputed_work.json`, and as a table to `docs/understand/how-it-works.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from examples import results_file
from examples.benchmarks.networks import MODELS, workload
from examples.benchmarks.summary import Spread, spread_text
from examples.benchmarks.training_step import Step
from examples.benchmarks.variants import VARIANTS
from lightning_convbn.ops import calls as calls_of_functions
from lightning_convbn.ops.elementwise import Clip
from lightning_convbn.ops.packed import PackedBits, recipe_of_indices
from lightning_convbn.ops.repetition import Repetition

RESULTS = results_file.BENCHMARKS / "recomputed_work.json"
PAGE = results_file.ROOT / "docs" / "understand" / "how-it-works.md"
MARK = "recomputed-work"
CPU = torch.device("cpu")


def main() -> None:
    """Measure network by network, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = [measure(name, arguments.batch, arguments.pixels, arguments.rounds) for name in arguments.models]
    print(*(lines := table(rows)), sep="\n")
    if arguments.out == RESULTS:
        PAGE.write_text(results_file.with_table(PAGE.read_text(), MARK, lines))
    print(results_file.write_json(arguments.out, rows, ("torch", "torchvision"), machine=results_file.machine(CPU)))


def measure(name: str, batch: int, pixels: int, rounds: int) -> dict[str, Any]:
    """Time steps in turns, and the calls that are made again. All times are in seconds, one for each round."""
    work = workload(name, batch, pixels, CPU, channels_last=False)
    row: dict[str, Any] = {"model": name, "batch": batch, "pixels": pixels}
    times: dict[str, list[float]] = {"none": [], "elementwise": [], "again": []}
    calls: list[float] = []
    with calls_timed(calls):
        steps = [Step(work, VARIANTS[variant].build(work), CPU, "fp32") for variant in ("tune", "tune_recompute")]
        for number in range(rounds + 1):
            plain = steps[0].seconds()
            calls.clear()
            recomputing = steps[1].seconds()
            if number:  # the first round warms up
                for what, seconds in zip(times, (plain, recomputing, sum(calls)), strict=True):
                    times[what].append(round(seconds, 5))
    return {**row, "calls": len(calls), **times}


@contextmanager
def calls_timed(calls: list[float]) -> Iterator[None]:
    """Have each call that computes again, packs or unpacks add the seconds it took to a list."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls.append(time.perf_counter() - started)

        return run

    begin = Repetition.__init__

    def init(self: Repetition, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        begin(self, timed(compute), *args, **kwargs)

    def indices(*args: Any) -> Callable[[], Any]:
        return timed(timed(recipe_of_indices)(*args))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Repetition, "__init__", init))
        stack.enter_context(mock.patch.object(calls_of_functions, "recipe_of_indices", indices))
        for owner, name in ((PackedBits, "__init__"), (PackedBits, "unpack"), (Clip, "between"), (Clip, "rebuild")):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw a table: medians of the ratios to the step without recomputation in the same round, and their quartiles."""
    lines = ['| network | step, in relation to `"none"` | calls made again, and packing, take |', "|---|---|---:|"]
    for row in rows:
        steps, again = (Spread.of(_ratios(row[what], row["none"])) for what in ("elementwise", "again"))
        lines.append(f"| {row['model']} | {spread_text(steps, 2)} | {100 * again.median:.1f} % of it |")
    medians = [median(_ratios(row["elementwise"], row["none"])) for row in rows]
    return [*lines, f"| median of these | {median(medians):.2f} | |"]


def _ratios(values: Sequence[float], references: Sequence[float]) -> list[float]:
    return [value / reference for value, reference in zip(values, references, strict=True)]


if __name__ == "__main__":
    main()
