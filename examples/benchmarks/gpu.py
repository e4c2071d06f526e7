"""Measure training steps on one GPU, in at most eight minutes, beside published figures.

    python examples/benchmarks/gpu.py

writes `docs/benchmarks/gpu.json` and fills in the page `gpu.md` beside it. First Tune mode is compared with Eval mode
in float64. If they differ, nothing is measured. Then all modes are measured, cell by cell, as `all_modes.py` does: kept
bytes, the peak, and step times in interleaved rounds. The JSON file is written after each cell. A cell or a variant
that fails, out of memory for example, is in it with its error. So is a cell that has not begun when the time is over.

    python examples/benchmarks/gpu.py --quick --output quick.json

runs the same code on tiny images, on a CPU if there is no GPU. Such a file is not for the docs, so it needs a name.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from examples import results_file
from examples.benchmarks import all_modes, gpu_page
from examples.benchmarks.networks import DETECTOR, Workload, build
from examples.benchmarks.summary import SETTING, cell_table, title
from examples.benchmarks.training_step import Step, deviation
from examples.benchmarks.variants import INDUCTOR_PASS, VARIANTS
from lightning_convbn.exporting.atomic_file import check_writable
from lightning_convbn.text import first_line

RESULTS = gpu_page.RESULTS
PACKAGES = ("torch", "torchvision")
MODES = ("eval", "train", "tune", "tune_recompute", "deploy")
BLOCKS = ("tune_blocks", "checkpoint", "checkpoint_blocks")
COMPILED = (INDUCTOR_PASS, "compiled", "tune_compiled")
QUICK_NETWORKS = ("mobilenet_v2", "resnet18")
NETWORKS = ("efficientnet_b0", "densenet121", "mobilenet_v2", "resnet50")
DETECTOR_IMAGES = (4, 800)  # images, and pixels of an edge
DETECTOR_MODES = ("eval", "tune", "tune_recompute", "tune_blocks", "deploy")
ROUNDS, QUICK_ROUNDS = 7, 1
# Both modes round as often as a sum has terms and a network has layers, by 2**-53 at most: some thousand of them for an
# output, and more for a gradient. A wrong fold is off by 1e-8 or more.
PARITY = {"output": 1e-12, "gradients": 1e-10}

Cell = tuple[dict[str, Any], Sequence[str]]


def main() -> None:
    """Compare, then measure cell by cell, and write the JSON after each; the page at the end."""
    parser = _parser()
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    try:
        path = _output(arguments)
    except ValueError as error:
        parser.error(str(error))
    warnings.simplefilter("ignore")  # from compilers, about what they can't fuse
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    deadline = time.perf_counter() + 60 * arguments.minutes
    compared = [compare(name, device, 32 if arguments.quick else 64) for name in parity_networks(arguments.quick)]
    print(results_file.as_table(compared), end="\n\n", flush=True)
    if wrong := [row["model"] for row in compared if not row["equal"]]:
        raise SystemExit(f"Tune mode differs from Eval mode in {', '.join(wrong)}; nothing was measured")
    facts = {
        "device": device.type,
        "quick": arguments.quick,
        "machine": results_file.machine(device),
        "float32": _float32(device),
        "parity": compared,
    }
    rows: list[dict[str, Any]] = []
    cells = list(quick_cells(device.type) if arguments.quick else all_cells(device.type))
    for number, (setting, variants) in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {setting['model']}, {title(setting)}", end=": ", flush=True)
        if time.perf_counter() > deadline:
            row = {**setting, "variants": {}, "failed": f"not begun: {arguments.minutes:g} minutes were over"}
        else:
            row = measure(setting, variants, QUICK_ROUNDS if arguments.quick else ROUNDS)
        rows.append(row)
        results_file.write_json(path, rows, PACKAGES, **facts)
        said = [row["failed"]] if "failed" in row else ["", *cell_table(row), ""]
        print(*said, sep="\n", flush=True)
    print(f"{len(rows)} cells in {path}")
    if path.resolve() == RESULTS.resolve():
        print(f"wrote {gpu_page.write()}")


def parity_networks(quick: bool) -> Sequence[str]:
    """The networks that are compared in float64."""
    return QUICK_NETWORKS[:1] if quick else ("resnet18", *NETWORKS)


def compare(name: str, device: torch.device, pixels: int) -> dict[str, Any]:
    """Compare Tune mode with Eval mode in float64: the largest relative deviations, without and with recomputing."""
    model = build(name)[0].to(device=device, dtype=torch.float64)
    images = torch.rand(2, 3, pixels, pixels, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    work = Workload(model, (images.to(device),))
    found = []
    for variant in ("eval", "tune", "tune_recompute"):
        step = Step(work, VARIANTS[variant].build(work), device, "fp32")
        with torch.no_grad():
            output = step.model(*work.inputs)
        found.append(({"output": output}, step.gradients()))
    expected, *others = found
    row: dict[str, Any] = {"model": name, "pixels": pixels}
    for place, what in enumerate(PARITY):
        row[what] = float(f"{max(deviation(other[place], expected[place]) for other in others):.3g}")
    return row | {"equal": all(row[what] <= most for what, most in PARITY.items())}


def measure(setting: dict[str, Any], variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure one cell; if that fails as a whole, the error is the result."""
    try:
        return all_modes.measure(setting, variants, rounds)
    except Exception as error:  # out of memory when the network was built, for example
        return {**setting, "variants": {}, "failed": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        gc.collect()
        if setting["device"] == "cuda":
            torch.cuda.empty_cache()


def all_cells(device: str) -> Iterator[Cell]:
    """What is measured, the comparisons with published figures first."""
    for published in gpu_page.PUBLISHED:
        setting = dict(zip(SETTING, (*published.setting, device, "fp32", False), strict=True))
        compiled = COMPILED if INDUCTOR_PASS in published.gigabytes else ()
        yield setting, [*MODES, *BLOCKS, *compiled]
    known = {published.setting for published in gpu_page.PUBLISHED}
    for batch, name, channels_last, precision in product((64, 1), NETWORKS, (False, True), ("fp32", "bf16")):
        if (name, batch, 224) in known and precision == "fp32" and not channels_last:
            continue
        setting = dict(zip(SETTING, (name, batch, 224, device, precision, channels_last), strict=True))
        plain = batch > 1 and precision == "fp32" and not channels_last
        yield setting, [*MODES, *(BLOCKS if plain else ())]
    for precision in ("fp32", "bf16"):
        yield dict(zip(SETTING, (DETECTOR, *DETECTOR_IMAGES, device, precision, False), strict=True)), DETECTOR_MODES


def quick_cells(device: str) -> Iterator[Cell]:
    """Two cells on tiny images; between them each precision and each layout."""
    for name, precision, channels_last in zip(QUICK_NETWORKS, ("bf16", "fp32"), (True, False), strict=True):
        yield dict(zip(SETTING, (name, 2, 32, device, precision, channels_last), strict=True)), MODES


def _output(arguments: argparse.Namespace) -> Path:
    """Return the path of the JSON file. What a CPU or a quick run measures must not be in the docs.

    Raises:
        ValueError: If there is no GPU, if the file can't be written, or if it would be that of the docs.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU on this machine; use --device cpu")
    path: Path = arguments.output or RESULTS
    if (arguments.device != "cuda" or arguments.quick) and path.resolve() == RESULTS.resolve():
        reason = "--quick" if arguments.quick else f"--device {arguments.device}"
        raise ValueError(f"--output: {RESULTS.name} of the docs is for a whole run on a GPU; with {reason} name a file")
    check_writable(f"--output {path}", path)
    return path


def _float32(device: torch.device) -> dict[str, str]:
    """How float32 is multiplied. PyTorch's own setting is used, which for convolutions on a GPU is TF32."""
    if device.type != "cuda":
        return {}
    backends: Any = torch.backends  # partly untyped
    settings = {"convolutions": backends.cudnn.conv, "matrix products": backends.cuda.matmul}
    return {name: str(setting.fp32_precision) for name, setting in settings.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default, help="default: the GPU, if there is one")
    parser.add_argument("--quick", action="store_true", help="tiny images and a single round, to try the script")
    parser.add_argument("--minutes", type=float, default=8, help="no cell begins after that time (default: 8)")
    parser.add_argument("--output", type=Path, help="the JSON file; default, on a GPU: docs/benchmarks/gpu.json")
    return parser


if __name__ == "__main__":
    main()
