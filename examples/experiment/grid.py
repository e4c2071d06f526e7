"""A grid of runs: those that have no result yet are run, and the results are written after each."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from examples.data.pretrained_weights import WeightsError
from examples.experiment.networks import NETWORKS
from examples.experiment.training import DATA
from examples.results_file import write_json
from lightning_convbn.exporting.atomic_file import check_writable

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")

Row = dict[str, Any]


class Named(Protocol):
    """A cell: a named tuple, whose fields are columns of its row."""

    def _asdict(self) -> Row: ...


Cell = TypeVar("Cell", bound=Named)


def add_grid_options(parser: argparse.ArgumentParser, *, limit: int, image_size: int, out: Path) -> None:
    """Add the options that every grid has.

    Args:
        parser: The parser of the script.
        limit: Training images, by default.
        image_size: Edge of the images in pixels, by default.
        out: The file of the results, by default.
    """
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="pretrained networks (%(default)s)")
    add("--data", nargs="+", choices=DATA, default=[*DATA], help="data sets (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the sets, their order and the head (%(default)s)")
    add("--epochs", type=above_zero, default=2, help="passes over the training images (%(default)s)")
    add("--limit", type=above_zero, default=limit, help="training images (%(default)s)")
    add("--image-size", type=above_zero, default=image_size, help="edge of the square images in pixels (%(default)s)")
    add("--jobs", type=above_zero, default=1, help="cells to run at the same time, one thread each (%(default)s)")
    add("--out", type=Path, default=out, help="the results (%(default)s)")


def above_zero(text: str) -> int:
    """Read a whole number above zero."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")


def run_script(main: Callable[[], None]) -> None:
    """Run the script of a grid, which may be stopped."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on with the next cell")


def read_rows(path: Path, settings: Row) -> list[Row]:
    """Return the rows of an existing file. A file with other settings is refused."""
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text())
        rows, others = list(found["rows"]), found["settings"]
    except (ValueError, LookupError, TypeError) as error:
        sys.exit(f"error: --out {path}: no results of this script ({error!r}); name another file")
    if others != settings:
        sys.exit(f"error: --out {path}: holds runs with {others}, not with {settings}; name another file")
    return rows


def to_run(grid: Sequence[Cell], rows: Sequence[Row], out: Path) -> list[Cell]:
    """Return the cells that have no row yet, and say how many they are."""
    cells = [cell for cell in grid if not any(cell._asdict().items() <= row.items() for row in rows)]
    print(f"{len(grid) - len(cells)} of {len(grid)} cells are in {out}; {len(cells)} are to run")
    return cells


@contextmanager
def tell_what_is_wrong(out: Path) -> Iterator[None]:
    """End the script with one line if what is done here finds wrong arguments, or if the file can't be written."""
    try:
        yield
        out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(f"--out {out}", out)
    except ImportError as error:
        sys.exit(f"error: --nets: {error.name} is not installed; pip install --editable '.[examples]'")
    except (WeightsError, OSError, ValueError) as error:  # a DataError is a ValueError
        sys.exit(f"error: {error}")


def run_grid(
    rows: Sequence[Row],
    cells: Sequence[Cell],
    run: Callable[[Cell], Row],
    *,
    jobs: int,
    out: Path,
    place: Callable[[Row], Any],
    **facts: Any,
) -> None:
    """Run cells, and write all rows after each.

    Args:
        rows: Those that are there already.
        cells: What to run.
        run: From a cell to its row. It can be pickled.
        jobs: Cells to run at the same time.
        out: The file.
        place: What the rows are sorted by.
        **facts: Further entries of the file.
    """
    found = [*rows]
    bar = tqdm(_run_all(cells, run, jobs), total=len(cells), unit="cell", mininterval=0)
    for row in bar:
        found.append(row)
        write_json(out, sorted(found, key=place), PACKAGES, **facts)
        result = "diverged" if row["diverged"] else f"{row['accuracy']:.3f}"
        name = " ".join(f"{field} {row[field]}" for field in cells[0]._asdict())
        bar.set_postfix_str(f"{name}: {result}")
    print(f"wrote {out}")


def _run_all(cells: Sequence[Cell], run: Callable[[Cell], Row], jobs: int) -> Iterator[Row]:
    """Yield the rows as they are finished, from this process or from several."""
    if jobs == 1:
        yield from map(run, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
