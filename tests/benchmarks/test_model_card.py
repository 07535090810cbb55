"""The model card: figures from a report, the recipe from settings and logs, and nothing for another model."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import model_card
from benchmarks.control import net_key
from benchmarks.crack_tiny import table
from benchmarks.stock import model_key
from benchmarks.training_record import BadRecord, read_logs, record
from benchmarks.verdicts import verdicts
from workers.training.crack_tiny import PROFILE
from workers.training.crack_tiny_hone import Settings as Honing
from workers.training.crack_tiny_hone import parsed
from workers.training.crack_tiny_settings import Settings

LOG = """[transformers] something else
autoencoder 50/100 loss 0.5000 0.720 s/step 0.6 min left
autoencoder 100/100 loss 0.4000 0.720 s/step 0.0 min left
base 250/300 loss 0.1000 1.440 s/step 1.2 min left
base 300/300 loss 0.0900 1.440 s/step 0.0 min left
style-night-0a1b 25/25 loss 0.0300 3.600 s/step 0.0 min left
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as far as the card looks at it."""
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    weights = {"w": np.zeros((1000, 70), np.float16)}
    for name in ("unet/diffusion_pytorch_model", "lcm-lora", "style-night"):
        save_file(weights, model / f"{name}.safetensors")
    (model / "profile.json").write_text(json.dumps(PROFILE))
    return model


def report(folder: Path) -> dict[str, Any]:
    row = {
        "wall": 0.98,
        "crack": 0.97,
        "whole": 0.94,
        "direction": 0.96,
        "hairlines": None,
        "rising": 0.45,
        "bent": 0.125,
        "distance": 1.25,
        "sharpness": 0.912,
    }
    rows = {
        way.name: {**row, "lcm": way.lcm, "steps": way.steps, "guidance": way.guidance, "passes": way.passes,
                   "seconds": 0.1 * way.passes}
        for way in table(3.0)
    }  # fmt: skip
    made = {
        "analyser": {"count": 500, "seeds": 4, "wall": 0.996, "crack": 0.994, "direction": 0.99, "hairlines": 0.98},
        "model": model_key(folder), "count": 500, "seed": 1, "guidance": 3.0,
        "machine": {"processor": "a toy", "threads": 2, "device": "cpu", "load": 0.1, "torch": "2", "diffusers": "0"},
        "seconds": {"alone": 0.42, "together": 0.2},
        "features": {"name": "x", "size": 64, "right": {"wall": 0.99, "direction": 0.95}},
        "painted": row, "autoencoder": row, "rows": rows,
        "nights": {"count": 64, "painted": 0.21, "weights": {"0": 0.44, "1": 0.25}, "bright": 0.125},
    }  # fmt: skip
    return {**made, "verdicts": verdicts(made)}


def files(tmp_path: Path) -> tuple[Path, Path]:
    settings = {**{name: getattr(Settings(), name) for name in Settings.__slots__}, "autoencoder_steps": 100}
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "base_steps": 400}))
    (tmp_path / "train.log").write_text(LOG)
    return tmp_path / "settings.json", tmp_path / "train.log"


def test_logs_tell_steps_losses_and_hours(tmp_path: Path) -> None:
    _, log = files(tmp_path)
    found = read_logs([log])
    assert found["autoencoder"] == {"steps": 100, "of": 100, "loss": 0.4, "hours": 0.02}
    assert found["base"] == {"steps": 300, "of": 300, "loss": 0.09, "hours": 0.04}, "a resumed run: one lap each line"
    assert found["style"]["hours"] == 0.025
    assert read_logs([log, log])["base"]["hours"] == 0.08, "work done twice took its time twice"


def test_the_card_says_what_was_measured(folder: Path, tmp_path: Path) -> None:
    settings, log = files(tmp_path)
    text = model_card.card(report(folder), record(settings, [log], "two toy cores", None, ["Smells of paint."]), folder)
    lines = text.splitlines()
    assert "| autoencoder | 100 | 16 crops of 64x64, then 4 whole pictures | 0.001 | 0.400 | 0.02 |" in lines
    assert "| base | 300 | 16 | 0.0007 | 0.090 | 0.04 |" in lines, "what was done, where it is less than planned"
    assert "| LCM-LoRA, 4 steps | 4 | 0.980 | 0.970 | 0.940 | 0.960 | - | 0.450 | 0.125 | 1.25 | 0.91 | 0.40 |" in lines
    assert (
        "| DDIM, guidance 3, 50 steps | 100 | 0.980 | 0.970 | 0.940 | 0.960 | - | 0.450 | 0.125 | 1.25 | 0.91 | 10.00 |"
        in lines
    )
    assert "| unet/diffusion_pytorch_model.safetensors | 0.07 M | F16, 0.1 MB |" in lines
    assert "- Smells of paint." in lines
    assert sum(line.startswith("- **not reached**: 4 UNet passes") for line in lines) == 2
    assert sum(line.startswith("- Not reached: 4 UNet passes") for line in lines) == 2
    assert "`style-night.safetensors` is a style adapter" in text
    assert "One picture alone in 4 LCM-LoRA steps: 0.420 s; each of eight together: 0.200 s." in lines
    assert "steps is 0.44 at weight 0, 0.25 at weight 1; painted by night it is 0.21." in text.replace("\n", " ")
    assert "0.12 of them are brighter, at the greatest weight, than 19 of 20 painted nights." in lines
    assert "{" not in text.replace("{'", "")


def test_the_control_nets_figures_stand_before_the_limits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, log = files(tmp_path)
    (folder / "control-mask").mkdir()
    save_file({"w": np.ones(3, np.float16)}, folder / "control-mask" / "diffusion_pytorch_model.safetensors")
    rates = {"precision": 0.98, "recall": 0.9512, "f1": 0.9654, "seen": 1.0}
    measured = {
        "model": model_key(folder), "control": net_key(folder / "control-mask"), "pictures": 64, "steps": 4,
        "weight": 1.0, "tolerance": 3, "seconds": 9.0,
        "alignment": {"painted": rates, "with control": rates, "without": {**rates, "f1": None}},
    }  # fmt: skip
    told = tmp_path / "control.json"
    whole = model_card.card(report(folder), record(settings, [log], "two toy cores", None, []), folder)
    (folder / "README.md").write_text(whole)
    for recall in (0.9512, 0.75):
        measured["alignment"]["with control"] = {**rates, "recall": recall}
        told.write_text(json.dumps(measured))
        assert model_card.main(["--model", str(folder), "--control", str(told)]) == 0
        text = (folder / "README.md").read_text()
        assert f"| with the ControlNet | 0.980 | {recall:.3f} | 0.965 | 100% |" in text
        assert "| without | 0.980 | 0.951 | - | 100% |" in text
        before, _, rest = text.partition("\n## Cracks that follow a mask\n")
        assert f"{before}\n## Limits\n{rest.partition('## Limits' + chr(10))[2]}" == whole, "all else stays"
    (folder / "README.md").write_text("# another text\n")
    (tmp_path / "wrong.json").write_text(json.dumps({**measured, "control": "0" * 16}))
    for given, words in ((told, "the card has no section"), (tmp_path / "wrong.json", "is about ControlNet 0000")):
        assert model_card.main(["--model", str(folder), "--control", str(given)]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model_card.main(["--control", str(told), "--hardware", "toy"])


def test_another_report_takes_the_place_of_the_figures_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, log = files(tmp_path)
    made = record(settings, [log], "two toy cores", None, ["Smells of paint."])
    better = report(folder)
    for row in better["rows"].values():
        row.update({"distance": 0.5} if row["lcm"] else {"wall": 0.5, "crack": 0.5, "direction": 0.5})
    better["verdicts"] = verdicts(better)
    (tmp_path / "report.json").write_text(json.dumps(better))
    card = folder / "README.md"
    given = ["--model", str(folder), "--report", str(tmp_path / "report.json")]
    for control in ("", f"{model_card.CONTROL_TITLE}\n\nWhat control gave.\n\n"):
        before, after = (
            model_card.card(one, made, folder).replace("## Limits", f"{control}## Limits")
            for one in (report(folder), better)
        )
        card.write_text(before)
        assert "- Not reached: " in before
        assert "- Not reached: " not in after
        assert model_card.main(given) == 0
        assert card.read_text() == after
    assert model_card.main([*given, "--note", "Dry by now.", "--note", "Sold."]) == 0
    assert card.read_text() == after.replace("- Smells of paint.\n", "- Dry by now.\n- Sold.\n")
    card.write_text("# another text\n")
    assert model_card.main(given) == 1
    assert "the card has no section '## Measured'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        model_card.main(["--model", str(folder)])


def test_what_was_gone_on_with_is_told_before_what_was_measured(folder: Path, tmp_path: Path) -> None:
    settings, log = files(tmp_path)
    style = tmp_path / "style-settings.json"
    style.write_text(json.dumps({"steps": 25, "batch": 16, "rate": 1e-3, "pictures": 9, "seed": 3}))
    whole = model_card.card(report(folder), record(settings, [log], "two toy cores", style, []), folder)
    assert "\n| style | 25 | 16 | 0.001 | 0.030 | 0.03 |\n" in whole
    (folder / "README.md").write_text(whole)
    said = ["--sharpen-steps", "50", "--wet", "1.5", "--walks", "4", "8"]
    unusual = replace(Honing(), sharpen_steps=50, wet=1.5, walks=(4, 8))
    assert parsed(["--model", "FOLDER", "--work", "DIR", *said])[0] == unusual
    (tmp_path / "hone-settings.json").write_text(json.dumps(asdict(unusual)))
    more = tmp_path / "hone.log"
    given = ["--model", str(folder), "--honed", str(tmp_path / "hone-settings.json"), "--log", str(more)]
    for loss in ("0.0444", "0.0333"):
        more.write_text(f"sharpen 50/50 loss {loss} 7.200 s/step 0.0 min left\n{LOG.splitlines()[-1]}\n")
        told = [*given, "--hardware", "one toy core", "--style", str(style), "--note", "It slept."]
        assert model_card.main(told) == 0
        text = (folder / "README.md").read_text()
        before, _, after = text.partition("\n## Gone on with\n")
        section, _, measured = after.partition("\n## Measured\n")
        assert f"| sharpen | 50 | 16 | 0.0003 | {float(loss):.3f} | 0.10 |" in section.splitlines()
        assert "| style | 25 | 16 | 0.001 | 0.030 | 0.03 |" in section.splitlines()
        assert "one toy core; 0.1 hours in all, as the logs tell. It slept." in section.replace("\n", " ")
        assert "Walks are of 4, 8 steps" in section.replace("\n", " ")
        panel = (
            "Readers: 2, which learned from 12,000 pictures, 4,000 whose cracks were put together from two and 2,000"
        )
        assert panel in section.replace("\n", " ")
        # What is printed makes what is shipped: every setting that is not usual stands in the command.
        assert f"crack_tiny_hone --model FOLDER --work DIR {' '.join(said)}\n" in section
        assert "style | 25" not in before, "the style that is there is told of once"
        assert measured == whole.partition("\n## Measured\n")[2], "all else stays"
    with pytest.raises(SystemExit):
        model_card.main(given)


def test_a_report_about_another_model_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, log = files(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps({**report(folder), "model": "0" * 16}))
    given = ["--settings", str(settings), "--log", str(log), "--hardware", "toy", "--model", str(folder)]
    assert model_card.main([*given, "--report", str(tmp_path / "report.json")]) == 1
    assert "the report is about model 0000000000000000" in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps(report(folder)))
    assert model_card.main([*given, "--report", str(tmp_path / "report.json")]) == 0
    assert (folder / "README.md").read_text().startswith("# crack-tiny\n")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    settings, log = files(tmp_path)
    with pytest.raises(BadRecord, match=r"gone\.log cannot be read"):
        record(settings, [tmp_path / "gone.log"], "", None, [])
    with pytest.raises(BadRecord, match=r"train\.log is not valid JSON"):
        record(log, [log], "", None, [])
    (tmp_path / "empty.log").write_text("nothing\n")
    with pytest.raises(BadRecord, match="no line of a training stage"):
        record(settings, [tmp_path / "empty.log"], "", None, [])
