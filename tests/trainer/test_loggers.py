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
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {key: [event.value for event in events.Scalars(key)] for key in events.Tags()["scalars"]}


def mlflow_metrics(logger: MLFlowLogger) -> dict[str, list[float]]:
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
    loggers = [LOGGERS[name][0](tmp_path) for name in names]
    make_trainer(ConvBNModeCallback(), max_epochs=2, logger=loggers).fit(BoringModule())
    read = [LOGGERS[name][1](logger) for name, logger in zip(names, loggers, strict=True)]
    for metrics in read:
        ours = {key: values for key, values in metrics.items() if "convbn" in key}
        assert ours.keys() == KEYS
        assert all(len(values) == 1 for values in ours.values())
    assert all(metrics[key][0] == pytest.approx(read[0][key][0], rel=1e-6) for metrics in read for key in KEYS)


@pytest.mark.parametrize(("mode", "start_epoch"), [("tune", 0), ("eval", 1)])
def test_each_metric_is_logged_once(tmp_path: Path, mode: Any, start_epoch: int) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(
        ConvBNModeCallback(mode, start_epoch=start_epoch), max_epochs=3, num_sanity_val_steps=1, logger=logger
    )
    trainer.fit(BoringModule())
    ours = {key: values for key, values in csv_metrics(logger).items() if key.startswith("convbn")}
    assert ours.keys() == KEYS
    assert {len(values) for values in ours.values()} == {1}
    for name in ("eval", "tune"):  # what is kept, and the batch, is alive at the peak
        assert ours[f"convbn/predicted_peak_{name}_mib"][0] > ours[f"convbn/activations_{name}_mib"][0]
    before, after, saved, percent = (
        ours[f"convbn/activations_{name}"][0] for name in ("eval_mib", "tune_mib", "saved_mib", "saved_percent")
    )
    # In Eval mode the three pairs keep at least their convolutions' outputs: 2 images, 8 channels, 8 x 8, 4 bytes.
    assert 0 < after < before - 3 * 2 * 8 * 8 * 8 * 4 / 2**20 * 0.9
    assert saved == pytest.approx(before - after, rel=1e-5)
    assert percent == pytest.approx(100 * saved / before, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [({"log_memory": False}, {}), ({}, {"fast_dev_run": True}), ({"mode": "train", "log_memory": False}, {})],
    ids=str,
)
def test_nothing_is_logged_when_it_should_not_be(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """Under ``fast_dev_run`` Lightning's loggers are dummies, and nothing of ours lands anywhere."""
    logger = CSVLogger(tmp_path)
    make_trainer(ConvBNModeCallback(**arguments), logger=logger, **options).fit(BoringModule())
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and "convbn" in file.read_text()]


def test_the_separator_is_the_loggers(tmp_path: Path) -> None:
    class Dashed(CSVLogger):
        @property
        def group_separator(self) -> str:
            return "-"

    logger = Dashed(tmp_path)
    make_trainer(ConvBNModeCallback(), logger=logger).fit(BoringModule())
    assert {key for key in csv_metrics(logger) if "convbn" in key} == {key.replace("/", "-") for key in KEYS}


def test_the_docs_name_every_logger() -> None:
    assert names_that_work() >= {*LOGGERS}
