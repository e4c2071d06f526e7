"""Execute the notebook `examples/tutorial.ipynb`, and put two of its pictures into the docs.

    python examples/run_tutorial.py

writes the notebook with its results, `docs/figures/tutorial-memory.png` and `docs/figures/tutorial-accuracy.png`.
"""

from __future__ import annotations

import argparse
import base64
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from examples.results_file import ROOT
from lightning_convbn.exporting.atomic_file import atomic_write

NOTEBOOK = ROOT / "examples" / "tutorial.ipynb"
PICTURES = {  # file -> what the cell that draws it calls its vertical axis
    ROOT / "docs" / "figures" / "tutorial-memory.png": "MiB kept",
    ROOT / "docs" / "figures" / "tutorial-accuracy.png": "balanced accuracy",
}
SECONDS_PER_CELL = 1200


def main() -> None:
    """Execute the notebook and write it, then its pictures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    notebook = execute(ROOT)
    with atomic_write(NOTEBOOK) as file:
        nbformat.write(notebook, file)
    for path, label in PICTURES.items():
        path.write_bytes(picture(notebook, label))


def execute(folder: Path) -> NotebookNode:
    """Run all cells in a new kernel of this Python; return the notebook with what they put out.

    Args:
        folder: Where the notebook writes its files.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=SECONDS_PER_CELL,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute()


def picture(notebook: NotebookNode, label: str) -> bytes:
    """Return the PNG that the cell with this text has drawn."""
    (drawn,) = (
        output.data["image/png"]
        for cell in notebook.cells
        if cell.cell_type == "code" and f'ylabel="{label}"' in cell.source
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    )
    return base64.b64decode(drawn)


if __name__ == "__main__":
    main()
