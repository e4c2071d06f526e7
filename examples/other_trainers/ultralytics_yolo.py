"""Tune mode in Ultralytics YOLO: `add_tune_mode(model)`, then `model.train(...)` as ever."""

from typing import Any

from lightning_convbn import set_mode


def add_tune_mode(model: Any) -> None:
    """Let a YOLO train in Tune mode. After the training, the trained network has its plain modules again."""
    model.add_callback("on_train_start", lambda trainer: set_mode(trainer.model, "tune"))
    model.add_callback("on_train_end", lambda trainer: set_mode(trainer.model, "train"))
