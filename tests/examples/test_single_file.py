"""The pages to copy: each runs in an empty folder, with nothing of this project but the installed package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.models import MobileNet_V2_Weights

import lightning_convbn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAGES = {path.stem: path for path in (EXAMPLES / "finetune.py", *(EXAMPLES / "single_file").glob("[!_]*.py"))}
SMALL = {  # page -> small settings of its `main`
    "adversarial": "size=64, step=300, batch_size=2, steps=2",
    "detection": "epochs=1, scenes=8, batch_size=4",
    "finetune": "folder={images!r}, epochs=1, size=32, batch_size=4",
    "segmentation": "epochs=2, scenes=16, batch_size=4",
}


def test_every_page_is_tested() -> None:
    assert PAGES.keys() == SMALL.keys()


@pytest.mark.parametrize("page", SMALL)
def test_a_copied_page_runs_in_an_empty_folder(page: str, images: Path, weights: Path, tmp_path: Path) -> None:
    copy, packages, cache = tmp_path / "copy", tmp_path / "packages", tmp_path / "torch" / "hub" / "checkpoints"
    for folder in (copy, packages, cache):
        folder.mkdir(parents=True)
    shutil.copy(PAGES[page], copy)
    (packages / "lightning_convbn").symlink_to(Path(lightning_convbn.__file__).parent)
    shutil.copy(weights, cache / Path(MobileNet_V2_Weights.IMAGENET1K_V1.url).name)  # nothing is downloaded
    without_examples = "import sys; sys.modules['examples'] = None"
    script = f"{without_examples}; from {page} import main; main({SMALL[page].format(images=str(images))})"
    environment = {**os.environ, "PYTHONPATH": str(packages), "TORCH_HOME": str(tmp_path / "torch")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    table = {mode: columns.split() for mode, columns in re.findall(r"^(eval|tune|deploy) (.*)$", done.stdout, re.M)}
    if page == "adversarial":
        assert list(table) == ["eval", "tune", "deploy"]
        assert {columns[2] for columns in table.values()} == {"8"}  # "3 of 8" images
        assert len({columns[0] for columns in table.values()}) == 1  # as many fool the network in each mode
        kept = {mode: float(columns[3]) for mode, columns in table.items()}
        assert kept["deploy"] <= kept["tune"] < 0.5 * kept["eval"]
    else:
        assert list(table) == ["eval", "tune"]
        assert "verified: Tune equals Eval" in done.stdout + done.stderr
        assert float(table["tune"][0]) < 0.8 * float(table["eval"][0])
        assert all(0 <= float(score) <= 1 for score in table["tune"][1:])
