"""Where pictures and captions come from, what is cut out of them, and in which order."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from workers.training import data, shards
from workers.training.errors import TrainingError
from workers.training.examples import Cut, Positions, Rows, cut, passes

SIZE = (32, 32)


def picture(color: int = 90, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, (color, 10, 20))


def png(color: int = 90) -> bytes:
    held = io.BytesIO()
    picture(color).save(held, "PNG")
    return held.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def seen(said: object, column: str = "text") -> list[tuple[tuple[str, ...], int]]:
    """Captions and red of every picture."""
    source = data.open_source(str(said), column, SIZE, 0)
    return [(source.captions(i), np.asarray(source.open(i))[0, 0, 0]) for i in range(len(source))]


def test_captions_beside_pictures(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, color in (("a.png", 1), ("deep/b.webp", 2)):
        picture(color).save(tmp_path / name, lossless=True)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption of {name}\n")
    assert seen(tmp_path) == [(("caption of a.png",), 1), (("caption of deep/b.webp",), 2)]


def jsonl(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metadata_as_datasets_has_it(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "unnamed.png"):
        picture(ord(name[0])).save(tmp_path / name)
    jsonl(tmp_path, [{"file_name": "b.png", "text": ["one", "two"]}, {"file_name": "a.png", "text": "alone"}])
    assert seen(tmp_path) == [(("alone",), ord("a")), (("one", "two"), ord("b"))]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,words\na.png,"commas, too"\nb.png,plain\n')
    assert seen(tmp_path, "words") == [(("commas, too",), ord("a")), (("plain",), ord("b"))]


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    shard(tmp_path / "x-000.tar", {"0.png": png(1), "0.txt": b"zero", "1.json": b'{"text": "one"}', "1.png": png(2)})
    shard(
        tmp_path / "x-001.tar",
        {
            "d/2.txt": b"two",
            "d/2.json": b'{"text": "not this"}',
            "d/2.cls": b"4",
            "d/2.seg.png": b"",
            "d/2.png": png(3),
        },
    )
    expected = [(("zero",), 1), (("one",), 2), (("two",), 3)]
    assert seen(tmp_path) == seen(tmp_path / "*.tar") == seen(tmp_path / "x-{000..001}.tar") == expected
    assert seen(tmp_path / "x-001.tar") == expected[2:]
    assert shards.expand("a{1..2}b{08..09}") == ["a1b08", "a1b09", "a2b08", "a2b09"]


def test_painted_walls_are_the_same_whenever_they_are_asked_for() -> None:
    one, other = (data.open_source("painter:5", "text", SIZE, 3) for _ in range(2))
    assert len(one) == 5
    assert one.open(4).tobytes() == other.open(4).tobytes() != one.open(3).tobytes()
    assert one.captions(4) == other.captions(4)
    assert data.fingerprint(one) == data.fingerprint(other)
    assert data.fingerprint(one) != data.fingerprint(data.open_source("painter:5", "text", SIZE, 4))


def empty(folder: Path) -> None:
    (folder / "notes.md").write_text("no picture")


def no_caption(folder: Path) -> None:
    for number in range(12):
        picture().save(folder / f"{number:02d}.png")
    (folder / "03.txt").write_text("a wall")
    (folder / "04.txt").write_text("  ")


def broken(folder: Path) -> None:
    (folder / "bad.jpg").write_bytes(b"no picture at all")
    (folder / "bad.txt").write_text("a wall")


def missing_file(folder: Path) -> None:
    jsonl(folder, [{"file_name": "gone.png", "text": "a wall"}])


def missing_column(folder: Path) -> None:
    picture().save(folder / "a.png")
    jsonl(folder, [{"file_name": "a.png", "caption": "a wall"}])


def half_json(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('\n{"file_name": ')


def number_caption(folder: Path) -> None:
    picture().save(folder / "a.png")
    jsonl(folder, [{"file_name": "a.png", "text": 7}])


def half_a_character(folder: Path) -> None:
    picture().save(folder / "a.png")
    jsonl(folder, [{"file_name": "a.png", "text": ["a wall", "\ud800 wall"]}])


def half_a_character_in_tar(folder: Path) -> None:
    shard(folder / "x.tar", {"0.png": png(), "0.json": b'{"text": "wall \\udfff"}'})


def deep(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('\n{"file_name": ' + "[" * 100_000)


def deep_in_tar(folder: Path) -> None:
    shard(folder / "x.tar", {"0.png": png(), "0.json": b"[" * 100_000})


def long_number(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"size": ' + "9" * 5000 + "}")


def packed(folder: Path) -> None:
    (folder / "x.tar.gz").write_bytes(b"")


def half_tar(folder: Path) -> None:
    path = shard(folder / "x.tar", {"0.png": png(), "0.txt": b"zero"})
    path.write_bytes(path.read_bytes()[:700])


def no_caption_in_tar(folder: Path) -> None:
    shard(folder / "x.tar", {"0.png": png(), "1.png": png(), "1.txt": b"one"})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (empty, r"holds no pictures \(\.bmp, \.jpeg"),
        (no_caption, r"11 of 12 pictures have no caption: .*00\.png, .* and 1 more\. Put it into metadata\.jsonl"),
        (broken, r"1 files cannot be read as pictures: .*bad\.jpg"),
        (missing_file, r"metadata\.jsonl, line 1: .*gone\.png is not there"),
        (missing_column, r"line 1: no column 'text'; its columns are file_name, caption \(--caption-column\)"),
        (half_json, r"metadata\.jsonl, line 2 cannot be read: Expecting value at character 15$"),
        (half_a_character, r"jsonl, line 1: caption '\\ud800 wall' holds half a character, the surrogate '\\ud800'$"),
        (half_a_character_in_tar, r"x\.tar:0\.json: caption 'wall \\udfff' holds half a character, the surrogate"),
        (deep, r"metadata\.jsonl, line 2 cannot be read: nested too deeply$"),
        (deep_in_tar, r"x\.tar:0\.json cannot be read: nested too deeply$"),
        (long_number, r"metadata\.jsonl, line 1 cannot be read: Exceeds the limit"),
        (number_caption, r"line 1: a caption is text or a list of texts, not 7"),
        (packed, r"x\.tar\.gz: shards are plain \.tar files"),
        (half_tar, r"x\.tar cannot be read as a tar file"),
        (no_caption_in_tar, r"1 of 2 pictures have no caption: .*x\.tar:0\.png"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    make(tmp_path)
    with pytest.raises(TrainingError, match=said):
        data.open_source(str(tmp_path), "text", SIZE, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("/no/such/place", "no such folder or shards; or write painter"),
        ("/no/such/{00..03}.tar", "4 of 4 shards are missing, first /no/such/00.tar"),
        ("painter:none", "write painter:COUNT"),
        ("painter:0", "write painter:COUNT"),
    ],
)
def test_what_data_may_be(given: str, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        data.open_source(given, "text", SIZE, 0)


def test_walls_smaller_than_the_painter_paints() -> None:
    with pytest.raises(TrainingError, match="sides must be 32"):
        data.open_source("painter:3", "text", (16, 16), 0)


def test_a_picture_cut_short_is_named_when_it_is_met(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "short.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    path.with_suffix(".txt").write_text("a wall")
    source = data.open_source(str(tmp_path), "text", SIZE, 0)
    reader = passes(Positions(source, Cut(*SIZE), seed=0, drop=0, read=True), Rows(1, 0, 1, 0), 0)
    with pytest.raises(TrainingError, match=r"short\.png cannot be read as a picture"):
        next(reader)


def test_pictures_are_upright_and_without_transparency() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert data.upright(clear).getpixel((0, 0)) == (255, 255, 255)
    turned = picture(size=(8, 6))
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    held = io.BytesIO()
    turned.save(held, "JPEG", exif=turned.getexif())
    assert data.upright(Image.open(held)).size == (6, 8)


def grey(numbers: np.ndarray, form: str, bits: int = 16, **more: object) -> Image.Image:
    """A picture of 16-bit numbers written and opened again, its tag for the bits changed."""
    held = io.BytesIO()
    Image.fromarray(numbers.astype(np.uint16)).save(held, form, **more)
    body = held.getvalue()
    if bits != 16:
        tag = struct.pack("<HHI", data.BITS, 3, 1)
        body = body.replace(tag + struct.pack("<H", 16), tag + struct.pack("<H", bits))
    return Image.open(io.BytesIO(body))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_sixteen_bits_keeps_its_shades(form: str) -> None:
    ramp = np.arange(256, dtype=np.uint32) * 257
    for turned, shades in ((1, ramp), (2, ramp[::-1])):
        exif = Image.Exif()
        exif[0x0112] = turned
        seen = np.asarray(data.upright(grey(np.broadcast_to(shades, (4, 256)), form, exif=exif)))
        assert seen.shape == (4, 256, 3)
        assert (seen == np.arange(256)[None, :, None]).all()


def test_grey_may_be_transparent_have_twelve_bits_or_the_great_end_first() -> None:
    ramp = np.array([[0, 1000, 2000, 65535]])
    assert np.asarray(data.upright(grey(ramp, "PNG", transparency=1000)))[0, :, 0].tolist() == [0, 255, 8, 255]
    # Pillow writes no 12 bits: three bytes are two numbers.
    packed = grey(np.array([[0xFF0F, 0x8000, 0]]), "TIFF", bits=12)
    assert packed.mode == "I;16"
    assert np.asarray(data.upright(packed))[0, :2, 0].tolist() == [16, 239]
    # X-rays are often stored with white as 0.
    film = grey(np.array([[0, 1000, 65535]]), "TIFF", tiffinfo={data.PHOTOMETRIC: 0})
    assert np.asarray(data.upright(film))[0, :, 0].tolist() == [255, 251, 0]
    big = Image.frombytes("I;16B", (2, 1), b"\x80\x00\xff\xff")
    assert np.asarray(data.upright(big))[0, :, 0].tolist() == [128, 255]


@pytest.mark.parametrize(("kind", "mode"), [(np.float32, "F"), (np.int32, "I")])
def test_numbers_without_a_white_are_refused_before_training(tmp_path: Path, kind: type, mode: str) -> None:
    image = Image.fromarray(np.ones((4, 4), kind))
    image.save(tmp_path / "deep.tif")
    (tmp_path / "deep.txt").write_text("a wall")
    said = rf"1 files cannot be read as pictures: .*deep\.tif \(it holds 32-bit .* \(mode {mode}\) .*: save it as grey"
    with pytest.raises(TrainingError, match=said):
        data.open_source(str(tmp_path), "text", SIZE, 0)
    shard(tmp_path / "x.tar", {"a.tif": (tmp_path / "deep.tif").read_bytes(), "a.txt": b"a wall"})
    source = data.open_source(str(tmp_path / "x.tar"), "text", SIZE, 0)
    with pytest.raises(TrainingError, match=rf"x\.tar:a\.tif cannot be read as a picture: .*mode {mode}"):
        source.open(0)


def tag(number: int, kind: int, count: int = 1) -> bytes:
    return struct.pack("<HHI", number, kind, count)


def test_a_wrong_tag_that_nobody_needs_stops_nothing(tmp_path: Path) -> None:
    """A camera that writes the resolution as text: pixels and how it was held are still there."""
    tags = tag(0x0112, 3) + struct.pack("<I", 6) + tag(0x011A, 2, 4) + b"300\0"
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    picture(size=(8, 6)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as image:
        assert data.upright(image).size == (6, 8)


def test_damage_that_pillow_does_not_foresee_names_the_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0II*\0")  # struct.error
    held = io.BytesIO()
    picture().save(held, "TIFF")
    strips = 0x0111
    body = held.getvalue().replace(tag(strips, 4), tag(strips, 5))  # TypeError: places of the pixels as fractions
    (tmp_path / "b.tif").write_bytes(body)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a wall")
    source = data.open_source(str(tmp_path), "text", SIZE, 0)
    for number, name in enumerate((r"a\.png", r"b\.tif")):
        with pytest.raises(TrainingError, match=rf"{name} cannot be read as a picture"):
            source.open(number)


def test_pictures_are_turned_as_pillow_turns_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    for held in range(10):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = held
        assert data.upright(image).tobytes() == ImageOps.exif_transpose(image).tobytes(), held


def columns(width: int, height: int) -> Image.Image:
    """Red says which column a pixel is in."""
    return Image.fromarray(np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 3)).copy())


def test_a_cut_says_what_it_cut() -> None:
    wide = columns(64, 32)
    middle, sizes = cut(wide, Cut(32, 32), mirrored=False, place=0.5)
    assert sizes == (32, 64, 0, 16, 32, 32)
    assert np.asarray(middle)[0, :, 0].tolist() == list(range(16, 48))
    end, sizes = cut(wide, Cut(32, 32), mirrored=True, place=1.0)
    assert sizes == (32, 64, 0, 32, 32, 32), "left of the crop in the mirrored picture"
    assert np.asarray(end)[0, :, 0].tolist() == list(range(31, -1, -1))
    high, sizes = cut(columns(10, 40), Cut(48, 32), mirrored=False, place=0.5)
    assert high.size == (48, 32)
    assert sizes == (40, 10, 80, 0, 32, 48)


def painted(**more: object) -> Positions:
    given = {"how": Cut(*SIZE, "random", flip=True), "seed": 5, "drop": 0.5, "read": True} | more
    return Positions(data.open_source("painter:6", "text", SIZE, 0), **given)  # type: ignore[arg-type]


def test_every_picture_comes_once_an_epoch_and_epochs_differ() -> None:
    reader = passes(painted(read=False), Rows(4, 0, 1, 0), 0)
    numbers = [each.number for found in islice(reader, 6) for each in found]
    epochs = [numbers[start : start + 6] for start in range(0, 24, 6)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_two_devices_share_what_one_would_see_and_a_late_start_changes_nothing() -> None:
    def numbers(size: int, process: int, processes: int, first: int, count: int) -> list[int]:
        reader = passes(painted(read=False), Rows(size, process, processes, first), 0)
        return [each.number for found in islice(reader, count) for each in found]

    alone = numbers(4, 0, 1, 0, 6)
    pairs = zip(numbers(2, 0, 2, 0, 6), numbers(2, 1, 2, 0, 6), strict=True)
    assert Counter(alone) == Counter(number for pair in pairs for number in pair)
    assert alone[8:] == numbers(4, 0, 1, 2, 4)


def test_crop_mirror_wording_and_dropping_belong_to_the_position(tmp_path: Path) -> None:
    columns(64, 32).save(tmp_path / "a.png")
    jsonl(tmp_path, [{"file_name": "a.png", "text": ["one", "two"]}])
    source = data.open_source(str(tmp_path), "text", SIZE, 0)

    def examples(drop: float) -> list[tuple[str, bool, int]]:
        positions = Positions(source, Cut(*SIZE, "random", flip=True), seed=5, drop=drop, read=True)
        found = [positions[number] for number in range(40)]
        return [(each.caption, each.mirrored, each.sizes[3]) for each in found if not isinstance(each, TrainingError)]

    half, none = examples(0.5), examples(0.0)
    assert half == examples(0.5)
    assert {caption for caption, *_ in none} == {"one", "two"}
    assert 8 <= sum(not caption for caption, *_ in half) <= 32
    assert [each[1:] for each in half] == [each[1:] for each in none], "options do not move each other's chances"
    assert 8 <= sum(mirrored for _, mirrored, _ in half) <= 32
    assert len({left for *_, left in half}) > 8


def test_reading_processes_give_what_one_process_gives() -> None:
    alone = islice(passes(painted(), Rows(2, 0, 1, 0), 0), 2)
    reader = passes(painted(), Rows(2, 0, 1, 0), 1)
    helped = list(islice(reader, 2))
    reader.close()
    for one, other in zip(alone, helped, strict=True):
        for left, right in zip(one, other, strict=True):
            assert (left.number, left.caption, left.sizes) == (right.number, right.caption, right.sizes)
            assert np.array_equal(left.pixels, right.pixels)  # type: ignore[arg-type]
