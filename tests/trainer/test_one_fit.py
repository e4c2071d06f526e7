"""The order of events in a fit is the one that the docs draw."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, make_trainer

from lightning_convbn import ConvBNModeCallback

pytestmark = LIGHTNING_SAYS

ROOT = Path(__file__).resolve().parents[2]
FILES = ("callback", "trainer/run", "trainer/first_batch", "trainer/converted_part")


def test_the_functions_of_a_fit_are_entered_in_the_order_of_the_docs() -> None:
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text()
    (drawn,) = re.findall(r"```text\n(ConvBNModeCallback.setup .*?)```", page, re.DOTALL)
    names = re.findall(r"^( *\S+)", drawn, re.MULTILINE)
    entered: list[str] = []
    running: list[str] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_code.co_qualname
        if not frame.f_code.co_filename.endswith(tuple(f"lightning_convbn/{file}.py" for file in FILES)):
            return
        if name not in {drawn.strip() for drawn in names}:
            return
        if event == "call":
            entered.append("    " * len(running) + name)
            running.append(name)
        elif event == "return":
            running.pop()

    trainer = make_trainer(ConvBNModeCallback(), limit_train_batches=2)
    sys.setprofile(note)
    try:
        trainer.fit(BoringModule())
    finally:
        sys.setprofile(None)
    assert entered == names
