"""`farm upload` and `farm uploads`: pictures sent, looked at and removed."""

from pathlib import Path

import orjson

from farm.cli.exits import Exit
from tests.cli.conftest import Run
from tests.client.fake import PICTURE, FakeFarm, Reply, page, problem, upload_document

UPLOADS = "/api/v1/uploads"


def test_one_picture_answers_its_hash_and_several_their_names_too(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", UPLOADS, lambda asked: Reply(201, upload_document(asked.body)))
    others = {"a.png": PICTURE, "b.jpg": b"\xff\xd8\xff a picture", "c.webp": b"RIFF a picture"}
    for name, data in others.items():
        Path(name).write_bytes(data)
    hashes = {name: str(upload_document(data)["hash"]) for name, data in others.items()}
    assert run("upload", "a.png").stdout == f"{hashes['a.png']}\n"
    several = run("upload", *others)
    assert several.stdout.splitlines() == [f"{hash_}  {name}" for name, hash_ in hashes.items()]
    assert [asked.body for asked in fake.asked[1:]] == list(others.values())
    assert [asked.headers["content-type"] for asked in fake.asked[1:]] == ["image/png", "image/jpeg", "image/webp"]
    told = orjson.loads(run("upload", "b.jpg", "--json").stdout)
    assert (told["hash"], told["file"], told["width"]) == (hashes["b.jpg"], "b.jpg", 64)


def test_what_was_sent_before_the_one_that_cannot_be_is_told(run: Run, fake: FakeFarm) -> None:
    fake.on("POST", UPLOADS, Reply(201, upload_document()), problem(422, "invalid-request", "the picture is cut off"))
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(PICTURE)
    result = run("upload", "a.png", "b.png")
    assert result.exit_code == Exit.USAGE
    assert result.stdout == f"{upload_document()['hash']}  a.png\n"
    assert result.stderr == "b.png could not be sent:\nfarm: the picture is cut off\n"
    Path("b.png").write_text("no picture")
    refused = run("upload", "b.png")
    assert refused.exit_code == Exit.USAGE
    assert refused.stderr == "b.png could not be sent:\nfarm: this is no PNG, JPEG or WebP picture\n"
    missing = run("upload", "a.png", "nowhere.png")
    assert missing.exit_code == Exit.USAGE
    assert "nowhere.png" in missing.stderr
    assert len(fake.asked) == 2, "nothing is sent where one is missing"


def test_they_are_listed_and_removed(run: Run, fake: FakeFarm) -> None:
    first, second = upload_document(), upload_document(b"another")
    fake.on("GET", UPLOADS, page(first, cursor="next"), page(second))
    shown = run("uploads", "list").stdout
    found = [line.split()[:3] for line in shown.splitlines() if "64x32" in line]
    assert found == [[one["hash"], "png", "64x32"] for one in (first, second)], shown
    assert fake.asked[1].query["cursor"] == ["next"]
    only = run("uploads", "list", "--limit", 1, "--json").stdout.splitlines()
    assert [orjson.loads(line)["hash"] for line in only] == [second["hash"]]
    fake.on("DELETE", f"{UPLOADS}/{first['hash']}", Reply(204, b""))
    fake.on("DELETE", f"{UPLOADS}/{second['hash']}", problem(409, "conflict", "2 jobs name it; delete them first"))
    result = run("uploads", "remove", first["hash"], second["hash"])
    assert result.exit_code == Exit.FAILED
    assert result.stdout == f"{first['hash']} removed\n"
    assert "delete them first" in result.stderr
    assert orjson.loads(run("uploads", "remove", first["hash"], "--json").stdout)["removed"] is True


def test_none(run: Run, fake: FakeFarm) -> None:
    fake.on("GET", UPLOADS, page())
    assert run("uploads", "list").stdout == "There are no uploads.\n"
