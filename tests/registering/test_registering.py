"""Models on their way into the farm: from every source, through a real worker's registrar, to pictures."""

from __future__ import annotations

import io
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageSequence
from safetensors.torch import load_file, save_file
from sqlalchemy import text

from farm import catalogue, jobs, registrations
from farm.errors import Conflict, InvalidRequest
from farm.maintenance import Sweeper
from farm.storage import Store
from tests.pipelines import originals, toys
from tests.registering.conftest import PROFILE, Bench, render
from tests.registering.hub import COMMIT, Hub
from workers.pipelines import original

pytestmark = pytest.mark.timeout(300)


def sha256_of(bench: Bench, job: Any) -> str:
    """Of the pixels alone: what a picture says of itself names its job."""
    return sha256(bench.pixels(job).tobytes()).hexdigest()


def test_a_hub_checkpoint_ends_in_a_picture_that_names_its_commit(bench: Bench, hub: Hub, sd_folder: Path) -> None:
    hub.repositories["toys/sd"] = sd_folder
    source = f"hf:toys/sd@{COMMIT}"
    ended = bench.end(bench.ask("toy", source, profile=PROFILE))
    assert (ended.state, ended.reason, ended.notes) == ("available", None, [])
    assert ended.bytes > 0
    (view,) = bench.do(catalogue.list_checkpoints)
    assert (view.hash, view.family) == (ended.hash, ended.family)
    assert view.family.startswith("sd-")
    job, told = render(bench, checkpoint="toy", acceleration="none")
    assert (job.width, job.checkpoint) == (64, "toy")
    assert told["models"] == [{"name": "toy", "sha256": ended.hash, "source": source, "revision": COMMIT}]
    assert not any(line.endswith((".bin", ".md")) for line in hub.asked)


def test_only_what_is_needed_leaves_the_hub(bench: Bench, hub: Hub, sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "repository")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {key: value.half() for key, value in load_file(weights).items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (folder / "README.md").write_text("words")
    hub.repositories["toys/sd"] = folder
    ended = bench.end(bench.ask("toy", f"hf:toys/sd@{COMMIT}", profile=PROFILE, variant="fp16"))
    assert ended.state == "available", ended.reason
    fetched = {line.partition(COMMIT)[2] for line in hub.asked if line.startswith("GET")}
    assert "/unet/diffusion_pytorch_model.fp16.safetensors" in fetched
    assert not {"/unet/diffusion_pytorch_model.safetensors", "/unet/diffusion_pytorch_model.bin"} & fetched
    assert "/README.md" not in fetched
    stored = {file.path for file in bench.do(catalogue.files, ended.hash)}
    assert "unet/diffusion_pytorch_model.safetensors" in stored


def test_the_same_model_from_s3_and_from_a_folder_is_stored_once(bench: Bench, store: Store, sd_folder: Path) -> None:
    first = bench.add("folder", sd_folder, profile=PROFILE)
    for file in bench.do(catalogue.files, first.hash):
        store.put(f"shelf/sd/{file.path}", store.get(file.key), "application/octet-stream", file.sha256)
    before = set(store.listing("models/", 1000))
    second = bench.end(bench.ask("bucket", f"s3://{store.bucket}/shelf/sd", profile=PROFILE))
    assert (second.state, second.hash) == ("available", first.hash)
    assert set(store.listing("models/", 1000)) == before
    store.delete_many(store.listing("", 1000))


def elsewhere(bench: Bench, hub: Hub, file: Path) -> tuple[str, str]:
    """Sources of the same file in S3 and in a repository, beside others that must not be taken."""
    place = f"shelf/{file.name}"
    for key in (place, f"{place}.bak", "shelf/other.safetensors"):
        bench.store.put(key, file.read_bytes(), "application/octet-stream", catalogue_sha(file))
    repository = file.parent / f"{file.stem}-repository"
    for name in (place, "shelf/other.safetensors", "model.safetensors"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, repository / name)
    hub.repositories[f"toys/{file.stem}"] = repository
    return f"s3://{bench.store.bucket}/{place}", f"hf:toys/{file.stem}@{COMMIT}/{place}"


def test_one_file_becomes_a_folder_that_renders(
    bench: Bench, hub: Hub, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    originals.pretend(monkeypatch, sd_folder)
    # A toy tokenizer goes with the toy text encoder.
    words = (json.loads((sd_folder.parent / "letters" / "vocab.json").read_text()), "#version: 0.2\n")
    monkeypatch.setattr(original, "clip_vocabulary", lambda: words)
    file = originals.original(sd_folder, tmp_path / "wall-v3.safetensors")
    ended = bench.add("wall", file, profile=PROFILE)
    _, told = render(bench, checkpoint="wall", acceleration="none")
    assert told["models"] == [{"name": "wall", "sha256": ended.hash, "source": "local:wall-v3.safetensors"}]
    for number, source in enumerate(elsewhere(bench, hub, file)):
        assert bench.end(bench.ask(f"wall-{number}", source, profile=PROFILE)).hash == ended.hash
    kept = bench.do(lambda conn: conn.execute(text("SELECT DISTINCT hash FROM model_files")).scalars().all())
    assert kept == [ended.hash], "the file itself is not kept beside the folder"


def test_adapters_find_their_family_and_render(
    bench: Bench, hub: Hub, sd_folder: Path, style_layers: Any, tmp_path: Path
) -> None:
    checkpoint = bench.add("toy", sd_folder, profile=PROFILE)
    made = toys.changes(style_layers, strength=2.0)
    file = toys.kohya(tmp_path / "rust.safetensors", made)
    assert bench.add("rust", file, "style").family == checkpoint.family
    folder = toys.peft_folder(tmp_path / "peft", made, {"unet": "unet"})
    assert bench.add("peft", folder, "style").family == checkpoint.family
    (tmp_path / "repository").mkdir()
    shutil.copy(file, tmp_path / "repository" / "pytorch_lora_weights.safetensors")
    hub.repositories["toys/lcm"] = tmp_path / "repository"
    ended = bench.end(bench.ask("lcm", f"hf:toys/lcm@{COMMIT}", "acceleration"))
    assert ended.state == "available", ended.reason
    plain, _ = render(bench, checkpoint="toy", acceleration="none", scheduler="ddim")
    styled, told = render(
        bench, checkpoint="toy", acceleration="lcm-lora",
        adapters=[{"name": "rust", "weight": 1.5}, {"name": "peft", "weight": -0.5}],
    )  # fmt: skip
    assert plain.image.sha256 != styled.image.sha256
    for number, source in enumerate(elsewhere(bench, hub, file)):
        same = bench.end(bench.ask(f"rust-{number}", source, "style"))
        assert (same.state, same.family) == ("available", checkpoint.family)
        (view,) = (one for one in bench.do(catalogue.list_adapters) if one.name == same.name)
        assert (view.source["source"], view.source["file_sha256"]) == (source, catalogue_sha(file))
    assert [one["name"] for one in told["models"]] == ["toy", "lcm", "rust", "peft"]
    assert told["models"][1]["revision"] == COMMIT
    assert told["models"][2]["file_sha256"] == catalogue_sha(file)


def catalogue_sha(file: Path) -> str:
    import hashlib

    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_vaes_by_name_and_the_tiny_one(bench: Bench, sd_folder: Path, tmp_path: Path) -> None:
    family = bench.add("toy", sd_folder, profile=PROFILE).family
    torch.manual_seed(5)
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    small.save_pretrained(tmp_path / "taesd", safe_serialization=True)
    assert "does not say whose latents" in bench.refused("taesd", tmp_path / "taesd", "vae")
    bench.add("taesd", tmp_path / "taesd", "vae", family=family)
    other = toys.vae()
    other.save_pretrained(tmp_path / "other", safe_serialization=True)
    assert "scaling_factor is that of sd15" in bench.refused("other", tmp_path / "other", "vae", family="sdxl")
    (view,) = bench.do(catalogue.list_vaes)
    assert (view.name, view.tiny, view.family) == ("taesd", True, family)
    own, _ = render(bench, checkpoint="toy", acceleration="none")
    tiny, told = render(bench, checkpoint="toy", acceleration="none", vae="tiny")
    named, _ = render(bench, checkpoint="toy", acceleration="none", vae="taesd")
    assert tiny.vae == "taesd"
    assert tiny.image.sha256 != own.image.sha256
    assert tiny.image.sha256 == named.image.sha256 or told["recipe"]["vae"] == view.hash
    with pytest.raises(InvalidRequest) as caught:
        render(bench, checkpoint="toy", acceleration="none", vae="nothing")
    assert caught.value.problems[0]["field"] == "vae"


def test_controlnets_find_their_family_and_are_followed(bench: Bench, sd_folder: Path, tmp_path: Path) -> None:
    family = bench.add("toy", sd_folder, profile=PROFILE).family
    ended = bench.add("edges", toys.controlnet(tmp_path / "edges", sd_folder), "controlnet")
    assert (ended.family, ended.notes) == (family, [])
    (view,) = bench.do(catalogue.list_controlnets)
    assert (view.name, view.hash) == ("edges", ended.hash)
    plain, _ = render(bench, checkpoint="toy", acceleration="none")
    asked = {"name": "edges", "image": bench.picture(1), "weight": 0.8, "end": 0.5}
    followed, told = render(bench, checkpoint="toy", acceleration="none", controls=[asked])
    assert followed.image.sha256 != plain.image.sha256
    assert followed.controls[0].model_dump() == {**asked, "start": 0.0}
    assert [one["name"] for one in told["models"]] == ["toy", "edges"]
    assert told["recipe"]["controls"][0]["hash"] == ended.hash
    (warm,) = bench.engine.warm()
    assert warm["controlnets"] == [{"hash": ended.hash}]


def test_an_animation_from_its_motion_adapter_to_the_store(
    bench: Bench, sd_folder: Path, style_layers: Any, tmp_path: Path
) -> None:
    family = bench.add("toy", sd_folder, profile=PROFILE).family
    other = toys.kohya(tmp_path / "other.safetensors", toys.changes(style_layers, seed=1))
    bench.add("lcm", other, "acceleration")
    wanted = {"checkpoint": "toy", "motion": "wind", "frames": 4, "fps": 5}
    wind = toys.motion(tmp_path / "wind")
    ended = bench.add("wind", wind, "motion", profile={"acceleration": "wind-lcm"})
    assert (ended.family, ended.notes) == (family, [])
    (view,) = bench.do(catalogue.list_motions)
    assert (view.name, view.hash, view.max_frames, view.acceleration) == ("wind", ended.hash, 8, "wind-lcm")
    for changes, field, words in (
        ({}, "acceleration", "wind is drawn with wind-lcm, which is no LCM-LoRA"),
        ({"frames": 9, "acceleration": "none"}, "frames", "wind knows at most 8 frames, not 9"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            render(bench, **{**wanted, **changes})
        assert words in next(one["problem"] for one in caught.value.problems if one["field"] == field)
    # Its own LCM-LoRA, whatever the checkpoint has.
    bench.add("wind-lcm", toys.kohya(tmp_path / "lcm.safetensors", toys.changes(style_layers)), "acceleration")
    job, told = render(bench, **wanted)
    assert (job.motion, job.frames, job.fps, job.suffix, job.acceleration) == ("wind", 4, 5, "webp", "lcm-lora")
    assert [one["name"] for one in told["models"]] == ["toy", "wind-lcm", "wind"]
    assert (told["recipe"]["motion"], told["recipe"]["scheduler"]) == (ended.hash, "lcm")
    stored = bench.do(jobs.image_of, bench.project, job.id)
    assert stored.key.endswith(".webp")
    with Image.open(io.BytesIO(bench.store.get(stored.key))) as image:
        assert (image.format, len(list(ImageSequence.Iterator(image))), image.size) == ("WEBP", 4, (64, 64))
    replay = bench.do(jobs.replay_job, bench.project, job.id)
    assert bench.executor.work_once()
    assert bench.do(jobs.get_job, bench.project, replay.id).replay.levels == 0


def test_refused_adapters_name_file_key_and_reason(
    bench: Bench, sd_folder: Path, style_layers: Any, tmp_path: Path
) -> None:
    bench.add("toy", sd_folder, profile=PROFILE)
    before = set(bench.store.listing("models/", 1000))
    first = sha256_of(bench, render(bench, checkpoint="toy", acceleration="none")[0])

    made = toys.changes(style_layers)
    good = load_file(toys.kohya(tmp_path / "good.safetensors", made))
    down = next(key for key in good if key.endswith("lora_down.weight"))
    cases: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "nan": ({**good, down: torch.full_like(good[down], float("nan"))}, "holds NaN"),
        "dora": ({**good, down.replace("lora_down.weight", "dora_scale"): torch.ones(16)}, "DoRA is not supported"),
        "foreign": ({"lora_unet_nowhere.lora_down.weight": torch.ones(4, 16)}, "no such layer"),
        "rank": ({**good, down: torch.ones(65_536, 16)}, "rank 65536 is over the limit"),
    }
    for name, (tensors, reason) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        told = bench.refused(name, file)
        assert f"{name}.safetensors: " in told
        assert reason in told
    assert [view.name for view in bench.do(catalogue.list_adapters)] == []
    assert sha256_of(bench, render(bench, checkpoint="toy", acceleration="none")[0]) == first, "the next picture"
    # What refused files left in S3 goes with the sweeper.
    bench.do(lambda conn: conn.execute(text("UPDATE doomed_objects SET delete_after = clock_timestamp()")))
    sweeper = Sweeper(bench.settings, bench.database, bench.store)
    sweeper.objects()
    assert set(bench.store.listing("models/", 1000)) == before


def test_refused_checkpoints_say_what_is_missing(bench: Bench, hub: Hub, sd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd_folder, tmp_path / "gaps")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({key: value for key, value in tensors.items() if key != "conv_out.bias"}, path)
    assert "conv_out.bias: this weight is missing" in bench.refused("gaps", folder, "checkpoint")
    save_file({key: torch.full_like(value, float("nan")) for key, value in tensors.items()}, path)
    told = bench.refused("nan", folder, "checkpoint", profile=PROFILE)
    assert "the test picture could not be rendered" in told
    hub.repositories["toys/pickle"] = tmp_path / "pickle"
    shutil.copytree(sd_folder, tmp_path / "pickle")
    (tmp_path / "pickle" / "unet" / path.name).rename(tmp_path / "pickle" / "unet" / "diffusion_pytorch_model.bin")
    ended = bench.end(bench.ask("pickle", f"hf:toys/pickle@{COMMIT}"))
    assert ended.state == "refused"
    assert "diffusion_pytorch_model.bin is a pickle, which is never loaded" in (ended.reason or "")
    for name, words in (("toys/none", "no such repository"), ("toys/pickle", "no such commit")):
        revision = COMMIT if "none" in name else "f" * 40
        ended = bench.end(bench.ask(name.replace("/", "-"), f"hf:{name}@{revision}"))
        assert words in (ended.reason or "")


def test_a_hub_that_is_away_or_lies_is_tried_again(bench: Bench, hub: Hub, sd_folder: Path) -> None:
    hub.repositories["toys/sd"] = sd_folder
    begun = bench.ask("toy", f"hf:toys/sd@{COMMIT}", profile=PROFILE)

    def due() -> None:
        bench.do(lambda conn: conn.execute(text("UPDATE registrations SET lease_until = NULL")))

    hub.down = True
    now = bench.end(begun)
    assert (now.state, now.finished_at) == ("waiting", None)
    assert "the hub does not answer" in (now.reason or "")
    assert not bench.registrar.once(), "not before its pause is over"
    hub.down = False
    hub.lying.add("unet/diffusion_pytorch_model.safetensors")
    due()
    assert "was announced" in (bench.end(begun).reason or "")
    hub.lying.clear()
    due()
    assert bench.end(begun).state == "available"
    hub.down = True
    other = bench.ask("other", f"hf:toys/sd@{COMMIT}")
    for _ in range(registrations.MOST_FAILURES):
        due()
        ended = bench.end(other)
    assert ended.state == "refused"
    assert "tried 5 times" in (ended.reason or "")


def test_a_name_is_given_once(bench: Bench, sd_folder: Path) -> None:
    source = f"hf:toys/sd@{COMMIT}"
    begun = bench.ask("toy", source)
    with pytest.raises(Conflict, match="being registered right now"):
        bench.ask("toy", source)
    assert bench.do(registrations.cancel, begun.id, bench.settings).state == "refused"
    bench.add("toy", sd_folder, profile=PROFILE)
    with pytest.raises(Conflict, match="is taken"):
        bench.ask("toy", source)
    for wrong in ("hf:toys/sd", "hf:toys/sd@main", "s3://b", "ftp://x", f"hf:toys/sd@{COMMIT}/../x"):
        with pytest.raises(InvalidRequest):
            bench.ask("next", wrong)
