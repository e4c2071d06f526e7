"""The files of `--json`, `--html` and `--plot`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.command_line import SMALL
from matplotlib.image import imread

from lightning_convbn.command import measure
from lightning_convbn.command.main import main
from lightning_convbn.exporting.atomic_file import atomic_write


class TestFiles:
    def test_all_files_are_written_and_only_they(self, capsys: pytest.CaptureFixture[str]) -> None:
        files = ["a.html", "a.json", "a.png"]
        options = [word for file in files for word in (f"--{file[2:].replace('png', 'plot')}", file)]
        assert main(["measure", *SMALL, "--rounds", "0", *options]) == 0
        assert sorted(os.listdir()) == files
        assert imread("a.png").shape[2] == 4
        assert json.loads(Path("a.json").read_text())["model"] == "helpers.networks:small_net"
        out, err = capsys.readouterr()
        assert "Deploy copy" in out
        assert err.splitlines() == ["wrote a.json", "wrote a.png", "wrote a.html"]

    def test_the_picture_has_room_for_peak_against_time_if_something_was_timed(self) -> None:
        heights = []
        for rounds in ("0", "1"):
            assert main(["measure", *SMALL, "--rounds", rounds, "--plot", "a.png"]) == 0
            heights.append(imread("a.png").shape[0])
        assert heights[0] < heights[1]

    def test_what_fails_half_way_leaves_the_old_file(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(path: Path, *_: object) -> None:
            path.write_text("half")
            raise OSError(28, "No space left on device")

        Path("a.png").write_text("old")
        monkeypatch.setattr(measure, "write_plot", fails)
        assert main(["measure", *SMALL, "--rounds", "0", "--plot", "a.png"]) == 1
        assert capsys.readouterr().err == "lightning-convbn: a.png was not written: No space left on device\n"
        assert os.listdir() == ["a.png"]
        assert Path("a.png").read_text() == "old"

    def test_a_written_file_has_the_rights_of_any_new_file(self) -> None:
        Path("plain").touch()
        with atomic_write(Path("whole")) as path:
            path.write_text("whole")
        assert Path("whole").stat().st_mode == Path("plain").stat().st_mode
