"""Compare FGSM and PGD in Eval, Tune and Deploy mode: images that fool the network, kept bytes, time.

    python examples/benchmarks/adversarial.py --out docs/benchmarks/adversarial.json

runs FGSM and PGD, by the `Attack` of `single_file/adversarial.py`, in each mode. Rounding may change the sign of a
gradient near zero, and with it a value of a pixel. So the table also says how many values equal those of Eval mode.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from examples.data.data_module import IMAGENET
from examples.data.images_with_classes import ImageData
from examples.data.pretrained_weights import WeightsError
from examples.data.sources import DataError
from examples.results_file import as_table, write_json
from examples.single_file.adversarial import MODES, Attack, Found
from examples.templates.networks.classifiers import build_classifier
from lightning_convbn import ConvBNModeCallback, measure_memory

ATTACKS: dict[str, dict[str, Any]] = {"fgsm": {"step_size": 2 / 255, "steps": 1, "random_start": False}, "pgd": {}}
BATCH = 10


def run(model: Attack, images: Tensor, mode: Any) -> tuple[list[Found], float]:
    """Attack images in a mode; return what was found, and the seconds."""
    callback = ConvBNModeCallback(eval_mode=mode)
    trainer = Trainer(inference_mode=False, callbacks=[callback], logger=False, enable_progress_bar=False)
    start = time.perf_counter()
    found: Any = trainer.predict(model, DataLoader(images, BATCH))  # type: ignore[arg-type]
    return found, time.perf_counter() - start


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
        data = ImageData(args.data, image_size=args.image_size, batch_size=BATCH)
        network = build_classifier("torchvision:mobilenet_v2", args.weights)
    except (DataError, WeightsError) as error:
        sys.exit(f"error: {error}")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    clean = (torch.cat([images for images, _ in data.test_dataloader()]) * std + mean).clamp(0, 1)
    batch = torch.rand(BATCH, 3, args.image_size, args.image_size, requires_grad=True)
    rows = []
    for attack, options in ATTACKS.items():
        model = Attack(network, **options)
        runs = [{mode: run(model, clean, mode) for mode in MODES} for _ in range(args.rounds)]
        for mode in MODES:
            pairs = list(zip(runs[0]["eval"][0], runs[0][mode][0], strict=True))
            rows.append(
                {
                    "attack": attack,
                    "mode": mode,
                    "fooled": sum(int((found.before != found.after).sum()) for _, found in pairs),
                    "images": len(clean),
                    "labels as in Eval": all(bool((a.after == b.after).all()) for a, b in pairs),
                    "values as in Eval, %": 100 * sum(same_values(*pair) for pair in pairs) / len(pairs),
                    "kept MiB": measure_memory(network, batch, mode=mode).saved_mib,
                    "seconds": min(each[mode][1] for each in runs),
                }
            )
    print(as_table(rows))
    print(write_json(args.out, rows, ("torch", "torchvision", "lightning"), threads=torch.get_num_threads()))


def same_values(one: Found, other: Found) -> float:
    """Return the share of values that differ by less than a thousandth of a step of 8-bit images."""
    return float(((one.images - other.images).abs() < 1e-3 / 255).double().mean())


if __name__ == "__main__":
    main()
