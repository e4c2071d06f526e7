"""Loggers: every key of the contract arrives, once in each, by the logger's own separator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.lightning_matrix import names_that_work
from helpers.tiny_training import LIGHTNING_SAYS, BoringModule, csv_metrics, make_trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_convbn import ConvBNModeCallback

pytestmark = LIGHTNING_SAYS

KEYS = {
    *(f"convbn/activations_{name}" for name in ("eval_mib", "tune_mib", "saved_mib", "saved_percent")),
    *(f"convbn/predicted_peak_{mode}_mib" for mode in ("eval", "tune")),
}


def tensorboard_metrics(logger: TensorBoardLogger) -> dict[str, list[float]]:
    """Read the event file."""
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def mlflow_metrics(logger: MLFlowLogger) -> dict[str, list[float]]:
    """Ask the store."""
    run = logger.experiment.get_run(logger.run_id)
    return {
        key: [metric.value for metric in logger.experiment.get_metric_history(logger.run_id, key)]
        for key in run.data.metrics
    }


def wandb_metrics(logger: WandbLogger) -> dict[str, list[float]]:
    """Ask the run, which is written to a file and not sent."""
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    return {key: [value] for key, value in summary.items() if isinstance(value, float)}


LOGGERS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], dict[str, list[float]]]]] = {
    "CSVLogger": (CSVLogger, csv_metrics),
    "TensorBoardLogger": (TensorBoardLogger, tensorboard_metrics),
    "MLFlowLogger": (lambda folder: MLFlowLogger(tracking_uri=(folder / "mlruns").as_uri()), mlflow_metrics),
    "WandbLogger": (lambda folder: WandbLogger(save_dir=folder, offline=True, project="test"), wandb_metrics),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is sent, asked or written outside of the test's folder."""
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    "names", [pytest.param([name], marks=pytest.mark.slow) for name in LOGGERS] + [[*LOGGERS]], ids="+".join
)
def test_every_key_arrives_once(names: list[str], tmp_path: Path) -> None:
    """In one logger, and in each of several."""
    loggers = [LOGGERS[name][0](tmp_path) for name in names]
    make_trainer(ConvBNModeCallback(), max_epochs=2, logger=loggers).fit(BoringModule())
    read = [LOGGERS[name][1](logger) for name, logger in zip(names, loggers, strict=True)]
    for metrics in read:
        ours = {key: values for key, values in metrics.items() if "convbn" in key}
        assert ours.keys() == KEYS
        assert all(len(values) == 1 for values in ours.values())
    assert all(metrics[key][0] == pytest.approx(read[0][key][0], rel=1e-6) for metrics in read for key in KEYS)


def test_the_separator_is_the_loggers(tmp_path: Path) -> None:
    """Some stores want another than a slash."""

    class Dashed(CSVLogger):
        @property
        def group_separator(self) -> str:
            return "-"

    logger = Dashed(tmp_path)
    make_trainer(ConvBNModeCallback(), logger=logger).fit(BoringModule())
    assert {key for key in csv_metrics(logger) if "convbn" in key} == {key.replace("/", "-") for key in KEYS}


def test_the_docs_name_every_logger() -> None:
    assert names_that_work() >= {*LOGGERS}
