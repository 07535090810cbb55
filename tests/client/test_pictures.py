"""Pictures: fetched without our key, checked, written whole, and not fetched twice."""

from pathlib import Path

import orjson
import pytest

from farm import errors
from farm.client import Farm, Saved
from farm.client.pictures import MANIFEST
from tests.client.fake import PICTURE, FakeFarm, Reply, job_document, serve_pictures


def test_a_batch_is_downloaded_with_its_manifest(fake: FakeFarm, farm: Farm, tmp_path: Path) -> None:
    batch = serve_pictures(fake, *(job_document(number, labels={"wall": "n"}) for number in range(20)))
    told: list[tuple[Saved, int]] = []
    result = farm.download(batch, tmp_path / "out", on_progress=lambda saved, done: told.append((saved, done)))
    assert (result.fetched, result.kept, result.pictures) == (20, 0, 20)
    names = [f"{number:06d}-{7 + number}.png" for number in range(20)]
    assert sorted(path.name for path in result.folder.iterdir()) == [*names, MANIFEST]
    assert all((result.folder / name).read_bytes() == PICTURE for name in names)
    entries = [orjson.loads(line) for line in result.manifest.read_bytes().splitlines()]
    assert [entry["file"] for entry in entries] == names
    assert entries[3]["seed"] == 10
    assert entries[3]["labels"] == {"wall": "n"}
    assert [done for _, done in told] == list(range(1, 21))


def test_a_second_run_fetches_only_what_is_missing_or_wrong(fake: FakeFarm, farm: Farm, tmp_path: Path) -> None:
    batch = serve_pictures(fake, *(job_document(number) for number in range(4)))
    farm.download(batch, tmp_path)
    (tmp_path / "000001-8.png").unlink()
    (tmp_path / "000002-9.png").write_bytes(b"half a pic")
    fake.asked.clear()
    result = farm.download(batch, tmp_path)
    assert (result.fetched, result.kept) == (2, 2)
    assert sum(path.startswith("GET /bucket/") for path in fake.paths()) == 2
    assert (tmp_path / "000002-9.png").read_bytes() == PICTURE


def test_a_picture_that_arrives_damaged_is_refused(fake: FakeFarm, farm: Farm, tmp_path: Path) -> None:
    good, bad = job_document(0), job_document(1)
    batch = serve_pictures(fake, good, bad)
    fake._routes["GET", f"/bucket/{bad['id']}"] = [Reply(body=PICTURE + b"!")]
    with pytest.raises(errors.IntegrityFailed):
        farm.download(batch, tmp_path)
    assert (tmp_path / "000000-7.png").exists(), "what was good stays for the next run"
    assert not (tmp_path / "000001-8.png").exists()
    assert not (tmp_path / MANIFEST).exists(), "an incomplete manifest is not put in its place"


def test_the_key_does_not_go_where_the_pictures_lie(fake: FakeFarm, farm: Farm) -> None:
    batch = serve_pictures(fake, job_document())
    ((job, picture),) = farm.images(batch)
    assert picture == PICTURE
    assert job.number == 0
    at_storage = [asked for asked in fake.asked if asked.path.startswith("/bucket/")]
    assert at_storage
    assert all("authorization" not in asked.headers for asked in at_storage)
    assert at_storage[0].query == {"X-Amz-Signature": ["a/b"]}, "the signed query arrives as it was signed"


def test_images_may_be_left_early(fake: FakeFarm, farm: Farm) -> None:
    batch = serve_pictures(fake, *(job_document(number) for number in range(100)))
    images = farm.images(batch)
    next(images)
    images.close()  # type: ignore[attr-defined]
    assert sum(path.startswith("GET /bucket/") for path in fake.paths()) < 40
