"""The tutorial: the notebook runs, its results are those that the docs show, and it tells nothing about a machine."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from torchvision.models import MobileNet_V2_Weights

from examples import run_tutorial

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tutorials" / "first-fine-tuning.md"
ONE_PHOTO = 0.5 / 25  # 25 of the 80 photos show the rarer class; its recall is half of the balanced accuracy


def text_of(notebook: NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    return "".join(output.text for output in outputs if output.output_type == "stream")


def accuracies(printed: str, mode: str) -> list[float]:
    (numbers,) = re.findall(rf"^{mode} mode: (.*)$", printed, re.MULTILINE)
    return [float(number) for number in numbers.split()]


def check_results(printed: str) -> None:
    """Tune mode keeps less than Eval mode, and trains alike."""
    kept = {mode: float(mib) for mode, mib in re.findall(r"^(\w+) mode keeps (.*) MiB$", printed, re.MULTILINE)}
    assert kept["Tune"] < 0.7 * kept["Eval"]
    assert "verified: Tune equals Eval" in printed
    eval_accuracies, tune_accuracies = (accuracies(printed, mode) for mode in ("Eval", "Tune"))
    assert len(eval_accuracies) == 4
    assert tune_accuracies == pytest.approx(eval_accuracies, abs=1.01 * ONE_PHOTO)
    (difference,) = re.findall(r"differ by at most (\S+) of their value", printed)
    assert float(difference) < 0.01
    (exported,) = re.findall(r"with a balanced accuracy of (\S+)$", printed, re.MULTILINE)
    assert float(exported) == pytest.approx(tune_accuracies[-1], abs=1.01 * ONE_PHOTO)


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    """The notebook with the results that are committed."""
    return nbformat.read(run_tutorial.NOTEBOOK, as_version=4)


def test_the_notebook_runs_and_both_modes_train_alike(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the layers and the photos of the notebook, and weights that need no network."""
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    shutil.copy(weights, cache / Path(MobileNet_V2_Weights.IMAGENET1K_V1.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of two processes that wait for each other take minutes
    check_results(text_of(run_tutorial.execute(tmp_path)))


def test_the_committed_results_are_of_pretrained_weights_that_learn(committed: NotebookNode) -> None:
    printed = text_of(committed)
    check_results(printed)
    before, *_, last = accuracies(printed, "Tune")
    assert before < 0.65 < last - 0.05
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", run_tutorial.PICTURES, ids=lambda path: path.name)
def test_the_pictures_of_the_docs_are_those_of_the_notebook(committed: NotebookNode, path: Path) -> None:
    assert path.read_bytes() == run_tutorial.picture(committed, run_tutorial.PICTURES[path])


def test_first_fine_tuning_md_shows_code_and_results_of_the_notebook(committed: NotebookNode) -> None:
    """So its code blocks are run above."""
    page, printed = PAGE.read_text(), text_of(committed)
    code = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "code")
    blocks = [block.strip() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    results = [result.strip() for result in re.findall(r"```text\n(.*?)```", page, re.DOTALL)]
    text = re.sub(r"```.*?```|`[^`]*`|\([^)]*\)", "", page, flags=re.DOTALL)
    accuracies_named = re.findall(r"\d\.\d{3}", text)
    assert (len(blocks), len(results), len(accuracies_named)) == (7, 2, 2)
    assert [block for block in blocks if block not in code] == []
    assert [shown for shown in [*results, *accuracies_named] if shown not in printed] == []
