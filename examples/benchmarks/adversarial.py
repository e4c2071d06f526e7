"""Compare FGSM and PGD in Eval, Tune and Deploy mode: images that fool the network, kept bytes, time.

    python examples/benchmarks/adversarial.py --out docs/benchmarks/adversarial.json

runs both attacks of the template in each mode. Rounding may change the sign of a gradient near zero, and with it
a value of a pixel. So the table also says how many values equal those of Eval mode.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer

from examples.data.images_with_classes import ImageData
from examples.data.pretrained_weights import WeightsError
from examples.data.sources import DataError
from examples.results_file import as_table, write_json
from examples.templates.adversarial import Attack, Examples
from lightning_convbn import ConvBNModeCallback, measure_memory

Mode = Literal["eval", "tune", "deploy"]
MODES: tuple[Mode, ...] = get_args(Mode)


def run(model: Attack, data: ImageData, mode: Mode) -> tuple[list[Examples], float]:
    """Attack the test set in a mode; return the examples and the seconds."""
    callback = ConvBNModeCallback(eval_mode=mode)
    trainer = Trainer(inference_mode=False, callbacks=[callback], logger=False, enable_progress_bar=False)
    start = time.perf_counter()
    examples: Any = trainer.predict(model, data)
    return examples, time.perf_counter() - start


def main() -> None:
    """Attack in each mode, print a table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="photos", help="photos, elpv, imagefolder:PATH, ...")
    parser.add_argument("--weights", default="default", help="of MobileNetV2: default, none or a file")
    parser.add_argument("--image-size", type=int, default=224, help="edge of the square images in pixels")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each mode; the table shows the fastest")
    parser.add_argument("--out", type=Path, default=Path("runs/adversarial.json"), help="file for the results")
    args = parser.parse_args()
    try:
        data = ImageData(args.data, image_size=args.image_size, batch_size=10)
        attacks = [Attack(weights=args.weights, attack=attack) for attack in ("fgsm", "pgd")]
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    rows = []
    for model in attacks:
        images = torch.rand(10, 3, args.image_size, args.image_size, requires_grad=True)
        runs = [{mode: run(model, data, mode) for mode in MODES} for _ in range(args.rounds)]
        for mode in MODES:
            pairs = list(zip(runs[0]["eval"][0], runs[0][mode][0], strict=True))
            rows.append(
                {
                    "attack": model.attack,
                    "mode": mode,
                    "fooled": sum(int(found.fooled.sum()) for _, found in pairs),
                    "images": sum(len(found.clean) for _, found in pairs),
                    "labels as in Eval": all(bool((a[3] == b[3]).all()) for a, b in pairs),
                    "values as in Eval, %": 100 * sum(same_values(*pair) for pair in pairs) / len(pairs),
                    "kept MiB": measure_memory(model.network, images, mode=mode).saved_mib,
                    "seconds": min(each[mode][1] for each in runs),
                }
            )
    print(as_table(rows))
    print(write_json(args.out, rows, ("torch", "torchvision", "lightning"), threads=torch.get_num_threads()))


def same_values(one: Examples, other: Examples) -> float:
    """Return the share of values that differ by less than a thousandth of a step of 8-bit images."""
    return float(((one.adversarial - other.adversarial).abs() < 1e-3 / 255).double().mean())


if __name__ == "__main__":
    main()
