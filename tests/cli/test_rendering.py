"""`farm render` and the contact sheet of `farm demo`."""

import hashlib
from pathlib import Path

import orjson
import pytest
from PIL import Image, ImageChops, ImageFont

from farm.cli.contact_sheet import CELL, MARGIN, PAPER, draw, wrap
from farm.cli.exits import Exit
from tests.cli.conftest import Run
from tests.client.fake import (
    PICTURE,
    FakeFarm,
    Reply,
    batch_document,
    job_document,
    problem,
    serve_pictures,
    upload_document,
)

API = "/api/v1"
UPLOADS = f"{API}/uploads"
PROMPT = "A single split crack, on a concrete wall!"


def _serve(fake: FakeFarm, count: int, failed: int = 0) -> str:
    batch_id = serve_pictures(fake, *(job_document(number) for number in range(count - failed)))
    batch = batch_document(count, succeeded=count - failed, failed=failed) | {"id": batch_id}
    queued = batch | {"counts": {"queued": count}}
    submitted = job_document(state="queued", batch_id=batch_id, warnings=["cut"]) if count == 1 else queued
    fake.on("POST", f"{API}/jobs", Reply(201, submitted))
    fake.on("GET", f"{API}/batches/{batch_id}", Reply(body=queued), Reply(body=batch))
    return batch_id


def test_a_prompt_becomes_a_file(run: Run, fake: FakeFarm) -> None:
    _serve(fake, 1)
    arguments = ["--size", "64x32", "--steps", 2, "--adapter", "moss:0.5", "--negative", "rust", "--seed", 7]
    result = run("render", PROMPT, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == "a-single-split-crack-on-a-concrete-wall-7.png\n"
    assert Path(result.stdout.strip()).read_bytes() == PICTURE
    assert "warning: cut" in result.stderr
    assert fake.asked[0].lines == [
        {
            "prompt": PROMPT,
            "seed": 7,
            "steps": 2,
            "negative_prompt": "rust",
            "adapters": [{"name": "moss", "weight": 0.5}],
            "width": 64,
            "height": 32,
            "count": 1,
        }
    ]


def test_pictures_here_are_sent_and_named_by_their_hashes(run: Run, fake: FakeFarm) -> None:
    _serve(fake, 1)
    fake.on("POST", UPLOADS, lambda asked: Reply(201, upload_document(asked.body)))
    for number, name in enumerate(("a", "b", "c")):
        Path(f"{name}.png").write_bytes(PICTURE + bytes([number]))
    hashes = [hashlib.sha256(PICTURE + bytes([number])).hexdigest() for number in range(3)]
    arguments = ["--image", "a.png", "--strength", 0.5, "--mask", "b.png", "--control", "edges=c.png:0.8"]
    result = run("render", "wall", *arguments, "--control", f"depth={hashes[0]}")
    assert result.exit_code == 0, result.output
    *sent, job = fake.asked[:4]
    assert [asked.path for asked in sent] == [UPLOADS] * 3, "the one that is a hash is not sent"
    assert [asked.headers["content-type"] for asked in sent] == ["image/png"] * 3
    (asked,) = job.lines
    assert (asked["image"], asked["strength"], asked["mask"]) == (hashes[0], 0.5, hashes[1])
    assert asked["controls"] == [
        {"name": "edges", "image": hashes[2], "weight": 0.8},
        {"name": "depth", "image": hashes[0], "weight": 1.0},
    ]


def test_an_animation_is_asked_for_and_written_as_one(run: Run, fake: FakeFarm) -> None:
    batch_id = serve_pictures(fake, job_document(format="webp", motion="wind", frames=4, fps=5))
    fake.on("POST", f"{API}/jobs", Reply(201, job_document(state="queued", batch_id=batch_id)))
    fake.on("GET", f"{API}/batches/{batch_id}", Reply(body=batch_document(1, succeeded=1) | {"id": batch_id}))
    result = run("render", "wall", "--motion", "wind", "--frames", 4, "--fps", 5, "--out", "wall.webp")
    assert result.stdout == "wall.webp\n", result.output
    assert fake.asked[0].lines == [{"prompt": "wall", "motion": "wind", "frames": 4, "fps": 5, "count": 1}]


@pytest.mark.parametrize(
    ("reply", "code", "words"),
    [
        (problem(413, "too-large", "the picture is over the limit"), Exit.USAGE, "the picture is over the limit"),
        (problem(403, "forbidden", "this key may not"), Exit.AUTH, "this key may not"),
    ],
)
def test_a_picture_that_is_not_taken_is_named(run: Run, fake: FakeFarm, reply: Reply, code: Exit, words: str) -> None:
    Path("a.png").write_bytes(PICTURE)
    fake.on("POST", UPLOADS, Reply(201, upload_document(PICTURE)), reply)
    result = run("render", "wall", "--image", "a.png", "--mask", "a.png")
    assert result.exit_code == code
    assert "a.png could not be sent:" in result.stderr
    assert f"farm: {words}" in result.stderr
    assert fake.paths() == [f"POST {UPLOADS}"] * 2, "no job is submitted"


def test_a_picture_that_cannot_be_sent_is_named(run: Run, fake: FakeFarm) -> None:
    Path("words.png").write_text("not a picture")
    for arguments, words in (
        (["--image", "nowhere.png"], "nowhere.png: No such file"),
        (["--image", "."], ".: Is a directory"),
        (["--image", "words.png"], "words.png could not be sent:\nfarm: this is no PNG, JPEG or WebP picture"),
        (["--control", "edges=nowhere.png"], "nowhere.png: No such file"),
        (["--control", "edges"], "NAME=PICTURE"),
    ):
        result = run("render", "wall", *arguments)
        assert result.exit_code == Exit.USAGE
        assert words in result.stderr, arguments
    assert not fake.asked


def test_rendering_overwrites_no_other_picture(run: Run, fake: FakeFarm) -> None:
    Path("out").mkdir()
    Path("out/wall-7.png").write_bytes(b"another picture")
    _serve(fake, 1)
    assert run("render", "wall", "--out", "out").stdout == "out/wall-7-2.png\n"
    assert run("render", "wall", "--out", "out").stdout == "out/wall-7-2.png\n", "the same picture needs no second file"


@pytest.mark.parametrize(("count", "written"), [(1, ["a/b.png"]), (2, ["a/b-7.png", "a/b-8.png"])])
def test_a_file_may_be_named(run: Run, fake: FakeFarm, count: int, written: list[str]) -> None:
    _serve(fake, count)
    assert run("render", "wall", "--count", count, "--out", "a/b.png").stdout.splitlines() == written


@pytest.mark.parametrize(
    ("stored_as", "suffix", "out"),
    [("webp", "webp", "wall.webp"), ("jpeg", "jpg", "wall.jpeg"), ("jpeg", "jpg", "o.JPG")],
)
def test_a_picture_is_called_as_its_format(run: Run, fake: FakeFarm, stored_as: str, suffix: str, out: str) -> None:
    batch_id = serve_pictures(fake, job_document(format=stored_as, quality=80))
    done = batch_document(1, succeeded=1) | {"id": batch_id}
    fake.on("POST", f"{API}/jobs", Reply(201, job_document(state="queued", batch_id=batch_id)))
    fake.on("GET", f"{API}/batches/{batch_id}", Reply(body=done))
    wanted = ["render", "wall", "--format", stored_as, "--quality", 80]
    assert run(*wanted).stdout == f"wall-7.{suffix}\n"
    assert (fake.asked[0].lines[0]["format"], fake.asked[0].lines[0]["quality"]) == (stored_as, 80)
    assert run(*wanted, "--out", out).stdout == f"{out}\n"
    assert run("download", batch_id, "--out", "all").exit_code == 0
    assert Path(f"all/000000-7.{suffix}").read_bytes() == PICTURE
    assert f'"file":"000000-7.{suffix}"' in Path("all/manifest.ndjson").read_text()


def test_for_scripts(run: Run, fake: FakeFarm) -> None:
    _serve(fake, 2)
    lines = [orjson.loads(line) for line in run("render", "wall", "--count", 2, "--json").stdout.splitlines()]
    assert [(line["path"], line["job"]["seed"]) for line in lines] == [("wall-7.png", 7), ("wall-8.png", 8)]


def test_what_failed_is_said_and_the_rest_is_written(run: Run, fake: FakeFarm) -> None:
    _serve(fake, 2, failed=1)
    result = run("render", "wall", "--count", 2)
    assert result.exit_code == Exit.FAILED
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "wall.jpg"], "the pictures are PNG files; name one that ends in .png"),
        (["--out", "wall.png", "--format", "jpeg"], "the pictures are JPEG files; name one that ends in .jpg"),
        (["--format", "gif"], "none of png, webp, jpeg"),
        (["--size", "64"], "WIDTHxHEIGHT"),
        (["--adapter", "moss:nan"], "NAME:WEIGHT"),
        (["--count", "0"], "--count"),
    ],
)
def test_wrong_usage(run: Run, fake: FakeFarm, arguments: list[str], words: str) -> None:
    result = run("render", "wall", *arguments)
    assert result.exit_code == Exit.USAGE
    assert words in result.stderr
    assert not fake.asked


def test_ctrl_c_cancels_what_was_submitted(run: Run, fake: FakeFarm, monkeypatch: pytest.MonkeyPatch) -> None:
    batch_id = _serve(fake, 2)
    fake.on("POST", f"{API}/batches/{batch_id}/cancel", Reply(body=batch_document(2, cancelled=2)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("farm.client.Farm.wait", interrupt)
    assert run("render", "wall", "--count", 2).exit_code == Exit.INTERRUPTED
    assert fake.paths()[-1] == f"POST {API}/batches/{batch_id}/cancel"


def test_a_refusal_of_the_farm(run: Run, fake: FakeFarm) -> None:
    problems = [{"field": "checkpoint", "problem": "there is no checkpoint named x; did you mean crack-tiny?"}]
    fake.on("POST", f"{API}/jobs", problem(422, "invalid-request", "the job is not valid", problems=problems))
    result = run("render", "wall", "--checkpoint", "x")
    assert result.exit_code == Exit.USAGE
    assert "  checkpoint: there is no checkpoint named x; did you mean crack-tiny?" in result.stderr


def test_the_contact_sheet_shows_pictures_with_their_prompts_beneath() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    prompt = "Sunlight shining on an outdoor concrete wall with split cracks"
    sheet = draw([(Image.new("RGB", (64, 32), colour), prompt) for colour in colours])
    assert sheet.width == 2 * CELL + 3 * MARGIN
    for index, colour in enumerate(colours[:2]):
        left = MARGIN + index * (CELL + MARGIN)
        assert sheet.getpixel((left + CELL // 2, MARGIN + CELL // 2)) == colour
        beneath = sheet.crop((left, MARGIN + CELL, left + CELL, MARGIN + CELL + 60))
        inked = ImageChops.difference(beneath, Image.new("RGB", beneath.size, PAPER)).getbbox()
        assert inked is not None
        assert inked[2] - inked[0] > CELL // 2, "the prompt runs along its picture"


def test_captions_are_broken_between_words() -> None:
    font = ImageFont.load_default(20)
    lines = wrap("Sunlight shining on an outdoor concrete wall with split cracks", font, 200)
    assert " ".join(lines) == "Sunlight shining on an outdoor concrete wall with split cracks"
    assert all(font.getlength(line) <= 200 for line in lines)
    assert wrap("Betonoberflächenbeschaffenheit", font, 20) == ["Betonoberflächenbeschaffenheit"]
