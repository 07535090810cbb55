"""The encoders beside each other, on one small picture. Speed is not judged here."""

import json
from pathlib import Path

import pytest

from benchmarks import encoders


def test_every_encoder_is_measured_and_pngs_give_their_pixels_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoders.json"
    assert encoders.main(["--count", "1", "--side", "64", "--rounds", "1", "--out", str(out)]) == 0
    rows = {row["encoder"]: row for row in json.loads(out.read_text())}
    assert rows.keys() == encoders.ENCODERS.keys()
    assert {name for name, row in rows.items() if row["lossless"]} == {
        name for name in rows if name.startswith("png") or "every pixel" in name
    }
    assert (rows[encoders.OURS]["times"], rows[encoders.OURS]["size"]) == (1, 1)
    assert all(row["bytes"] > 0 for row in rows.values())
    assert encoders.OURS in capsys.readouterr().out


def test_an_encoder_that_spoils_pngs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.ENCODERS, encoders.OURS, encoders.ENCODERS["jpeg, quality 90"])
    assert encoders.main(["--count", "1", "--side", "64", "--rounds", "1"]) == 1
