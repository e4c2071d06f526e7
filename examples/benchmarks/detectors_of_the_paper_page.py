"""Draw the page of the docs about the paper's table of detectors, from what `detectors_of_the_paper.py` has counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAME = "detectors-of-the-paper.md"
TITLES = {
    "eval": "Eval",
    "tune_as_published": "Tune as published",
    "tune": "Tune",
    "tune_elementwise": "Tune + elementwise",
    "tune_blocks": "Tune + blocks",
}
TOLERANCE_PERCENT = 1  # how far a counted step may be from a real one in the tests
LEVELS = ("tune", "tune_elementwise", "tune_blocks")
INTRODUCTION = """# The paper's detectors

For users who want to know what Tune mode saves in a real detector, and for readers of
[the paper](https://arxiv.org/abs/2305.11624) who compare its table of detectors with this package. The paper trained
them with MMDetection on GPUs. Here one training step of each row is *counted* at its real size, {height} × {width} px,
without data and without a GPU, by `python examples/benchmarks/detectors_of_the_paper.py`. That takes minutes.

- *In all* is what must fit into memory: parameters, buffers, and the peak of a step with SGD and momentum, gradients
  included. This is nearest to what MMDetection reports. *Kept* is what the forward pass keeps for the backward pass.
- *Tune as published* leaves the folding to autograd, which keeps every folded weight. *Tune* is this package's.
- All counts are in GiB. The paper says GB, and does not say which. We read its figures as GiB. Read as 10⁹ bytes, they
  would be 7 % smaller.

## Beside the paper

*Less* is what Tune needs less than Eval, in GiB."""
DETAILS = """## What is counted

The detectors are torchvision's, set up as MMDetection's configurations do it: 80 classes, BatchNorms that use their
running statistics and are trained, and a frozen stem and first stage. In HRNet all is trained, because MMDetection's
HRNet freezes nothing. A batch has 2 to 16 images of 800 × 1333 px, padded to {height} × {width}.

| the paper's name | counted as | why |
|---|---|---|
| ResNeXt101 | ResNeXt-101 32x4d | the paper's mAP is .4126; MMDetection's model zoo has .412 for it, .421 for 64x4d |
| RegNet | RegNetX-3.2GF | the paper's mAP is .3985; the model zoo has .399 for it |
| HRNet | HRNetV2p-W32, the body from timm | the paper's mAP is .4017; the model zoo has .402 for it, .369 for W18 |
| fp16 | `torch.autocast` to float16 (a CPU's list), losses in float32 | MMDetection's fp16 is mixed precision |

A detector looks at values: at the overlap of boxes, and at scores. So it can't run without data as a whole. What is
counted has the same layers and losses, but fixed numbers of samples: for each image 256 anchors, 512 proposals and, in
Mask R-CNN, 128 proposals with a mask, the most that the configurations allow. RetinaNet's focal loss has all anchors,
and allocates as one kernel, as MMDetection's does. **Not counted** are: making anchors and proposals, matching them
with boxes, the boxes and masks of the data, workspaces of cuDNN, and what the allocator rounds up.

`tests/examples/test_detectors_of_the_paper.py` compares such steps with real training steps of torchvision's
detectors in float32, at a small size: the kept bytes and the peak are within {tolerance} % of what the CPU's
allocator has seen, without what a kernel both allocates and frees. In both, RetinaNet's focal loss is the one kernel
above. In fp16 the kept bytes of the same step are compared, and no peak.

## What it shows

{findings}"""


def as_markdown(report: dict[str, Any]) -> str:
    """Draw the page.

    Args:
        report: What is in the JSON file.
    """
    rows, size = report["rows"], {name: report[name] for name in ("height", "width")}
    lines = [INTRODUCTION.format(**size), "", *beside_the_paper(rows), "", "## Each level", "", "In all, GiB:", ""]
    lines += [*levels(rows, in_all), "", "Kept for the backward pass, GiB:", "", *levels(rows, kept), ""]
    lines.append(DETAILS.format(**size, tolerance=TOLERANCE_PERCENT, findings=findings(rows, report["half_batch"])))
    return "\n".join(lines) + "\n"


def findings(rows: Sequence[dict[str, Any]], half_batch: dict[str, Any]) -> str:
    """Say what the rows show."""
    apart = [abs(counted / paper - 1) for paper, counted in (less(row) for row in rows if row["precision"] == "fp32")]
    above = [row["eval"] - in_all(row, "eval") for row in rows if row["batch"] == 2]
    two, eight, sixteen = (less(row_of(rows, "Faster R-CNN", batch, "fp16")) for batch in (2, 8, 16))
    paper, counted = ((more - fewer) / 8 for fewer, more in zip(eight, sixteen, strict=True))
    rest = [counted - paper for paper, counted in (two, eight, sixteen)]
    folded = row_of(rows, "Faster R-CNN", 2, "fp32", backbone="ResNet-101")
    weights = kept(folded, "tune_as_published") - kept(folded, "tune")
    mask, retina = row_of(rows, "Mask R-CNN", 16, "fp16"), row_of(rows, "RetinaNet", 2, "fp32")
    above_tune = in_all(retina, "tune_elementwise") - in_all(retina, "tune")
    worse = sum(in_all(row, "tune_elementwise") > in_all(row, "tune") for row in rows)
    plain, blocks = (sum(in_all(row, name) for row in rows) for name in ("eval", "tune_blocks"))
    return f"""- **In fp32, Tune saves what the paper says**, if its GB are GiB. The saving of *Tune as published*
  differs from the paper's by {100 * max(apart):.1f} % at most. This package's Tune saves more: it keeps no folded
  weights.
- **The totals of the paper are higher**: in Eval mode at batch 2 by {min(above):.2f} to {max(above):.2f} GiB. So its
  percents are smaller. What is not counted is listed above. Which of it makes the difference we can't say: these
  rows were not run on a GPU with this package.
- **In fp16 each image saves what the paper says**: from batch 8 to 16 of Faster R-CNN {counted:.3f} GiB for each
  image are counted, and the paper has {paper:.3f}. At each of its batches the paper saves {min(rest):.2f} to
  {max(rest):.2f} GiB less than we count. Folded weights in float32 are {weights:.2f} GiB: maybe it kept those.
- **Blocks that run again save most**: {100 * (1 - blocks / plain):.0f} % of what Eval needs, in all rows together.
- **Elementwise recomputation changes little**, and in {worse} of {len(rows)} rows its peak is above Tune's. What it
  saves in a ResNet is at the max-pool, which is frozen here. In RetinaNet it is {above_tune:.2f} GiB above: the head
  concatenates its outputs, and
  [the concatenation holds its parts](../understand/how-it-works.md#recomputed-activations) until the losses are there.
- **One row of the paper does not fit.** Its Mask R-CNN with ResNet-101 at batch 16 needs less than its Faster R-CNN
  with the same backbone and batch, which has one head fewer. It has {mask["eval"]:.3f} GB in Eval mode,
  and {less(mask)[0]:.3f} less in Tune mode. We count {in_all(mask, "eval"):.3f} and {less(mask)[1]:.3f} at batch 16,
  and {in_all(half_batch, "eval"):.3f} and {less(half_batch)[1]:.3f} at batch {half_batch["batch"]}."""


def row_of(rows: Sequence[dict[str, Any]], *wanted: str | int, backbone: str | None = None) -> dict[str, Any]:
    """Return the first row with a detector, a batch and a precision."""
    keys = ("detector", "batch", "precision")
    found = (row for row in rows if tuple(row[key] for key in keys) == wanted)
    return next(row for row in found if backbone in (None, row["backbone"]))


def in_all(row: dict[str, Any], variant: str) -> float:
    """Return the GiB of parameters, buffers, and the peak."""
    return float(row["fixed_mib"] + row["counted"][variant]["peak_mib"]) / 1024


def kept(row: dict[str, Any], variant: str) -> float:
    """Return the GiB that are kept for the backward pass."""
    return float(row["counted"][variant]["kept_mib"]) / 1024


def less(row: dict[str, Any]) -> tuple[float, float]:
    """Return how much less Tune as published needs in all than Eval: in the paper, and as counted."""
    return row["eval"] - row["tune"], in_all(row, "eval") - in_all(row, "tune_as_published")


def beside_the_paper(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw the table that has the paper's figures beside the counted ones."""
    lines = ["| detector | paper: Eval → Tune | | less | counted: Eval → Tune as published | | less | Tune, here | |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        plain, published, tune = (in_all(row, name) for name in ("eval", "tune_as_published", "tune"))
        paper, counted = less(row)
        cells = [name(row), f"{row['eval']:.3f} → {row['tune']:.3f}", percent(row["eval"], row["tune"]), f"{paper:.3f}"]
        cells += [f"{plain:.3f} → {published:.3f}", percent(plain, published), f"{counted:.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{tune:.3f}', percent(plain, tune)])} |")
    return lines


def levels(rows: Sequence[dict[str, Any]], size: Any) -> list[str]:
    """Draw the table of one size in Eval mode and in each level of Tune mode, with percents of Eval's."""
    lines = [f"| detector | Eval | {' | '.join(f'{TITLES[level]} | ' for level in LEVELS)} |"]
    lines.append("|---|---:|" + "---:|---:|" * len(LEVELS))
    for row in rows:
        plain = size(row, "eval")
        cells = [f"{size(row, level):.2f} | {percent(plain, size(row, level))}" for level in LEVELS]
        lines.append(f"| {name(row)} | {plain:.2f} | {' | '.join(cells)} |")
    return lines


def name(row: dict[str, Any]) -> str:
    """Name a row by its detector, backbone, batch and precision."""
    return f"{row['detector']}, {row['backbone']}, {row['batch']} × {row['precision']}"


def percent(before: float, after: float) -> str:
    """Write a change, with a minus sign if it is less."""
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
