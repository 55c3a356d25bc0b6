from __future__ import annotations

import asyncio
import base64
import io
import os
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from retrv_r1_retriever.errors import ImageError
from retrv_r1_retriever.images import (
    ImageData,
    ImageSource,
    LocalImages,
    content_hash,
    image_hash,
    image_reference,
    load_content,
    load_query,
)
from retrv_r1_retriever.types import Content, ImageInput, Query
from tests.helpers import header_only_png

from .conftest import png


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> Any:
    assert image.mode == "RGB"
    return image.getpixel(at)


async def test_every_kind_of_input_gives_the_same_pixels(tmp_path: Path) -> None:
    data = png((10, 20, 30))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/ä b.png").write_bytes(data)
    source = LocalImages(tmp_path)
    assert isinstance(source, ImageSource)
    encoded = base64.b64encode(data).decode()
    inputs = [
        data,
        "sub/ä b.png",
        Path("sub/ä b.png"),
        str(tmp_path / "sub/ä b.png"),
        f"data:image/png;base64,{encoded}",
        f"DATA:image/png;charset=x;base64,{urllib.parse.quote(encoded)}",
        f"data:;base64,{encoded.rstrip('=')}",
        "data:image/png," + urllib.parse.quote_from_bytes(data),
    ]
    for one in inputs:
        loaded = await source.load(one)
        assert (pixel(loaded.image), loaded.image.size, loaded.hash) == ((10, 20, 30), (4, 3), image_hash(data))
    decoded = Image.open(io.BytesIO(data))
    loaded = await source.load(decoded)
    assert (pixel(loaded.image), loaded.hash) == ((10, 20, 30), image_hash(decoded))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png((0, 0, 0, 0), mode="RGBA"), (255, 255, 255)),  # transparent -> white
        (png((0, 0, 0, 128), mode="RGBA"), (127, 127, 127)),
        (png((0, 0), mode="LA"), (255, 255, 255)),
        (png(7, mode="L"), (7, 7, 7)),
        (png(1, mode="1"), (255, 255, 255)),
        (saved(Image.new("P", (2, 2), 0), "PNG", transparency=0), (255, 255, 255)),
        (saved(Image.fromarray(np.full((2, 2), 40_000, np.uint16)), "PNG"), (156, 156, 156)),
        (saved(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
        (saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
        (
            saved(
                Image.new("RGB", (2, 2), "red"),
                "GIF",
                save_all=True,
                append_images=[Image.new("RGB", (2, 2), "blue")] * 3,
            ),
            (255, 0, 0),
        ),
    ],
    ids=["alpha", "half-alpha", "grey-alpha", "grey", "bilevel", "palette", "16-bit", "float", "cmyk", "animated"],
)
async def test_everything_becomes_rgb(data: bytes, expected: tuple[int, int, int]) -> None:
    loaded = await LocalImages().load(data)
    assert pixel(loaded.image) == expected


async def test_exif_orientation_is_applied_and_a_broken_one_ignored() -> None:
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert (await LocalImages().load(saved(image, "JPEG", exif=exif))).image.size == (4, 8)
    assert (await LocalImages().load(saved(image, "JPEG", exif=b"Exif\0\0nonsense"))).image.size == (8, 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("missing.png", "expected a file, got no such file"),
        ("folder", "expected a file, got no such file"),
        ("text.png", "expected a readable PNG.* picture, got UnidentifiedImageError. Save"),
        ("cut.jpg", "expected a readable PNG.* picture, got OSError"),
        (b"", "expected a readable PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected a readable PNG"),
        ("../outside.png", "outside root"),
        ("folder/../../outside.png", "outside root"),
        ("link.png", "outside root"),
        ("folderlink/outside.png", "outside root"),
        ("/etc/hostname", "outside root"),
        ("nul\0.png", "expected a readable file"),
        ("x" * 5000, "expected a readable file"),
        ("https://example.com/a.png", "got a URL, and LocalImages fetches nothing"),
        ("HTTP://example.com/a.png", "got a URL"),
        ("s3://bucket/a.png", "got a URL"),
        ("file:///etc/hostname", "got a URL"),
        ("data:image/png;base64", "bad data URI"),
        ("data:image/png;base64,@@@@", "bad data URI"),
        (7, "expected bytes, a path, a data URI or a Pillow image, got int"),
        (None, "got NoneType"),
        (
            header_only_png(100_000, 100_000),
            "expected at most 50,000,000 pixels, got 10,000,000,000 pixels in its header. Shrink it, or raise max_pixels",
        ),
        (header_only_png(8_000, 8_000), "at most 50,000,000 pixels, got 8000 x 8000 = 64,000,000 pixels"),
        (Image.new("1", (8_000, 8_000)), "at most 50,000,000 pixels"),
    ],
)
async def test_what_is_refused(tmp_path: Path, bad: Any, message: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(png())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "folderlink").symlink_to(tmp_path)
    (root / "text.png").write_text("not a picture")
    (root / "cut.jpg").write_bytes(saved(Image.effect_noise((99, 99), 90), "JPEG")[:2000])
    with pytest.raises(ImageError, match=message):
        await LocalImages(root).load(bad)


async def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="raise max_pixels"):
        await LocalImages(max_pixels=1_000).load(png(size=(50, 50)))
    ours = LocalImages(max_pixels=10**12)  # Pillow's own limit is lower: raising ours would not help
    with pytest.raises(
        ImageError, match=r"at most 178,956,970 pixels, got 10,000,000,000 .* raise PIL.Image.MAX_IMAGE"
    ):
        await ours.load(header_only_png(100_000, 100_000))


async def test_limits(tmp_path: Path) -> None:
    data = png(size=(50, 50))
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png," + urllib.parse.quote_from_bytes(data)
    small = LocalImages(tmp_path, max_bytes=len(data) - 1)
    for image in (data, "a.png", uri, uri * 10):
        with pytest.raises(ImageError, match="raise max_bytes"):
            await small.load(image)
    frames = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(5)]
    with pytest.raises(ImageError, match="at most 4 frames, got 5 frames"):
        await LocalImages(max_frames=4).load(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))


async def test_paths_need_a_root(tmp_path: Path) -> None:
    for path in ("a.png", Path("a.png"), str(tmp_path / "a.png")):
        with pytest.raises(ImageError, match=r"LocalImages without a root. Pass LocalImages\(root=...\)"):
            await LocalImages().load(path)
    with pytest.raises(ImageError, match="LocalImages root: expected a folder"):
        LocalImages(tmp_path / "nope")


class Slow(LocalImages):
    """Counts how many pictures are read at once."""

    now = most = 0

    def _load(self, image: Any) -> Any:
        self.now += 1
        self.most = max(self.most, self.now)
        time.sleep(0.05)
        self.now -= 1
        return super()._load(image)


async def test_bounded_concurrency_beside_a_free_loop() -> None:
    source = Slow(concurrency=3, timeout_s=0.2)  # 4 rounds of 0.05 s: waiting for a turn does not count
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await asyncio.gather(*(source.load(png()) for _ in range(12)))
    ticker.cancel()
    assert source.most <= 3
    assert ticks > 10


async def test_timeout() -> None:
    with pytest.raises(ImageError, match=r"expected an answer within 0.01 s"):
        await Slow(timeout_s=0.01).load(png())


def test_one_source_serves_many_loops() -> None:
    source = LocalImages(concurrency=1)

    async def many() -> None:
        await asyncio.gather(*(source.load(png()) for _ in range(4)))

    asyncio.run(many())
    asyncio.run(many())


FORK = """
import asyncio, os, sys, time
from retrv_r1_retriever.images import LocalImages
source, picture = LocalImages(timeout_s=5), sys.stdin.buffer.read()
asyncio.run(source.load(picture))
time.sleep(0.2)  # until its thread waits for more: then the pool starts no other
child = os.fork()
if child == 0:
    asyncio.run(source.load(picture))
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_reads_pictures_too() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], input=png(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


async def test_load_query_decodes_once() -> None:
    class Counting(LocalImages):
        loads = 0

        async def load(self, image: ImageInput) -> ImageData:
            self.loads += 1
            return await super().load(image)

    source, asked = Counting(), Query(Content("t", png()))
    decoded = await load_query(source, asked)
    assert isinstance(decoded.content.image, Image.Image)
    assert decoded.id == asked.id
    assert await load_query(source, decoded) is decoded
    assert source.loads == 1
    own = Query(Content("t", decoded.content.image.copy()))  # a caller's picture may be turned, or have transparency
    assert await load_query(source, own) is not own
    assert source.loads == 2
    assert await load_query(source, Query.of("t")) == Query.of("t")
    assert source.loads == 2


async def test_load_content() -> None:
    text = Content("t")
    assert await load_content(LocalImages(), text) == (text, None)
    loaded, hash = await load_content(LocalImages(), Content("t", png()))
    assert loaded.text == "t"
    assert isinstance(loaded.image, Image.Image)
    assert hash == image_hash(png())


def test_content_hash_is_pinned() -> None:
    """Stored data depends on it: if this fails, raise the version and every stored memory becomes stale."""
    assert content_hash(Content("red shoe", "a/b.png")) == "c1:d08a42c37f5faad3c715f44e40f609a5"
    assert content_hash(Content(None, b"bytes")) == "c1:788a99ffa767398d2d0cba5b368ad80e"
    assert image_hash(b"bytes") == "i1:6ea7442bc44abc453a57f9153dda1bd6"


def test_content_hash_sees_what_counts() -> None:
    data, image = png(), Image.new("RGB", (2, 2))
    uri = image_reference(data)
    different = [
        Content("a"), Content("b"), Content("a", "b"), Content("ab"), Content("a", b"b"), Content(None, "a"),
        Content("a", image), Content("a", Image.new("RGB", (2, 2), "red")), Content("a", Image.new("RGB", (4, 1))),
        Content("a", data), Content("a", "data:broken"), Content("a", "data:brokem"),
    ]  # fmt: skip
    assert len({content_hash(content) for content in different}) == len(different)
    same = [Content("a", data), Content("a", uri), Content("a", "data:," + urllib.parse.quote_from_bytes(data))]
    assert len({content_hash(content) for content in same}) == 1
    assert content_hash(Content("", "p/q.png")) == content_hash(Content(None, Path("p/q.png")))


@given(st.text(min_size=1).filter(str.strip), st.binary(max_size=64) | st.text(max_size=20) | st.none())
def test_content_hash_takes_any_text(text: str, image: Any) -> None:
    assert content_hash(Content(text, image)) == content_hash(Content(text, image))


@pytest.mark.parametrize("image", ["a/b.png", "data:image/png;base64,AA", Path("a/b.png")])
def test_references_stay_as_they_are(image: Any) -> None:
    assert image_reference(image) == str(image)


async def test_pictures_without_a_path_become_data_uris() -> None:
    image = Image.new("RGB", (3, 2), (1, 2, 3))
    for given_image, mime in ((image, "image/png"), (png((1, 2, 3)), "image/png"), (saved(image, "BMP"), "image/bmp")):
        reference = image_reference(given_image)
        assert reference.startswith(f"data:{mime};base64,")
        assert pixel((await LocalImages().load(reference)).image) == (1, 2, 3)
    with pytest.raises(ImageError, match="expected a readable PNG"):
        image_reference(b"nonsense")
    with pytest.raises(ImageError, match="expected bytes, str, path or Pillow image, got int"):
        image_reference(7)  # type: ignore[arg-type]
