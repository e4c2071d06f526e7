"""Tune mode in the Trainer of Hugging Face: `Trainer(model, ..., callbacks=[TuneMode()])`."""

from typing import Any

from transformers import TrainerCallback

from lightning_convbn import ConvBNPairs, set_mode


class TuneMode(TrainerCallback):
    """Trains the model in Tune mode. After the training, the model has its plain modules again."""

    def __init__(self, pairs: ConvBNPairs | None = None) -> None:
        self.pairs = pairs  # what to fold; None for what can be found by tracing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Convert the model, and print what is folded."""
        print(set_mode(kwargs["model"], "tune", pairs=self.pairs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the plain modules."""
        set_mode(kwargs["model"], "train")
