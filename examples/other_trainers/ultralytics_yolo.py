"""Tune mode in Ultralytics YOLO: `add_tune_mode(model)`, then `model.train(...)` as ever."""

from typing import Any

from lightning_convbn import set_mode


def convert(trainer: Any) -> None:
    """Convert the network and print what is folded. When the training ends, it gets its plain modules again."""
    print(set_mode(trainer.model, "tune"))
    trainer.add_callback("teardown", lambda trainer: set_mode(trainer.model, "train"))


def add_tune_mode(model: Any) -> None:
    """Let a YOLO train in Tune mode."""
    model.add_callback("on_train_start", convert)
