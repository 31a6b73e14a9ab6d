"""Pictures open as the released code sees them, and every bad one is a `DataError`."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest

from cascadevl.data.image import draw_quality, image_size, jpeg_degrade, open_image
from cascadevl.errors import DataError
from cascadevl.types import ImageRef


def colourful(mode="RGB", size=(40, 30)):
    generator = np.random.default_rng(2)
    pixels = generator.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    return (
        PIL.Image.fromarray(pixels, "RGBA").convert(mode)
        if mode != "I;16"
        else PIL.Image.fromarray(generator.integers(0, 2**16, size[::-1], dtype=np.uint16))
    )


def saved(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, format=file_format, **options)
    return file.getvalue()


def refused(source, **options):
    with pytest.raises(DataError) as caught:
        open_image(ImageRef(source), source="data.jsonl:7", **options)
    error = caught.value
    assert error.source == "data.jsonl:7"
    assert error.field == "image"
    assert error.remedy
    assert str(error).startswith("data.jsonl:7: field 'image': ")
    return error


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGB", "TIFF"),
        ("RGB", "PPM"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("L", "JPEG"),
        ("1", "PNG"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("I;16", "PNG"),
        ("F", "TIFF"),
        ("RGB", "JPEG2000"),
        ("RGB", "MPO"),
        ("YCbCr", "JPEG"),
    ],
)
def test_every_mode_becomes_what_pil_converts_it_to(mode, file_format, tmp_path):
    content = saved(colourful(mode), file_format)
    path = tmp_path / "picture"
    path.write_bytes(content)
    with PIL.Image.open(io.BytesIO(content)) as picture, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(picture.convert("RGB"))
    for source in (content, path):
        opened = open_image(ImageRef(source), source="s")
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), expected)
        assert image_size(ImageRef(source), source="s") == (40, 30)


def test_palette_with_transparency_in_bytes_gives_no_warning():
    image = colourful("P")
    content = saved(image, "PNG", transparency=bytes(range(256)))
    np.testing.assert_array_equal(
        np.asarray(open_image(ImageRef(content), source="s")), np.asarray(image.convert("RGB"))
    )


def test_first_frame_of_an_animation_and_no_exif_rotation():
    frames = [PIL.Image.new("RGB", (8, 6), (shade, 0, 0)) for shade in (10, 200)]
    for file_format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        content = saved(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert open_image(ImageRef(content), source="s").getpixel((3, 3)) == (10, 0, 0)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    content = saved(colourful(size=(40, 30)), "JPEG", exif=exif)
    assert open_image(ImageRef(content), source="s").size == (40, 30)


def test_a_picture_in_memory_is_not_closed_nor_changed():
    image = colourful("RGBA")
    opened = open_image(ImageRef(image), source="s")
    assert opened.mode == "RGB"
    assert image.mode == "RGBA"
    image.load()
    opened.putpixel((0, 0), (1, 2, 3))
    same = open_image(ImageRef(opened), source="s")
    same.putpixel((0, 0), (9, 9, 9))
    assert opened.getpixel((0, 0)) == (1, 2, 3)


def test_root_is_joined_as_released(tmp_path):
    (tmp_path / "pictures").mkdir()
    colourful().save(tmp_path / "above.png")
    colourful().save(tmp_path / "pictures" / "a.png")
    root = tmp_path / "pictures"
    for path in (Path("a.png"), Path("../above.png"), tmp_path / "above.png"):
        assert open_image(ImageRef(path), source="s", root=root).size == (40, 30)
    assert "'a.png'" not in str(refused(Path("b.png"), root=root))
    assert str(root / "b.png") in str(refused(Path("b.png"), root=root))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("missing.png", "does not exist"),
        (".", "is not a file"),
        ("nul\0.png", "does not exist"),
        ("x" * 300, "cannot be reached|does not exist"),
        ("\ud800.png", "does not exist"),
    ],
)
def test_missing_pictures(tmp_path, path, words):
    error = refused(tmp_path / path)
    assert error.kind == "missing_image"
    assert any(word in error.problem for word in words.split("|"))
    error.problem.encode()  # printable, whatever the name


@pytest.mark.parametrize("path", ["s3://bucket/a.png", "http://host/a.png", "petrel-2:/x/a.png"])
def test_addresses_are_refused(path):
    error = refused(Path(path))
    assert error.kind == "unsupported_source"
    assert "download" in error.remedy


def test_files_that_are_no_pictures():
    for content in (b"", b"some text", b"%PDF-1.4 ...", b"\x89PNG", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert refused(content).kind == "unsupported_image"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000"])
def test_truncated_pictures(file_format):
    content = saved(colourful(size=(90, 70)), file_format)
    error = refused(content[: len(content) // 2])
    assert error.kind in ("corrupt_image", "unsupported_image")
    if file_format in ("PNG", "JPEG", "GIF", "BMP"):
        assert error.kind == "corrupt_image"
        assert error.__cause__ is not None


def png_header(width, height):
    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_000, 9_500), (14_000, 12_900), (2**31 - 1, 2**31 - 1)])
def test_size_is_judged_by_the_header(size):
    """Below PIL's warning nothing, above it nothing either, until the limit is passed."""
    error = refused(png_header(*size), max_pixels=90_000_000)
    assert error.kind == "oversized_image"
    assert "max_pixels" in error.remedy
    assert f"{size[0] * size[1]} pixels" in error.problem
    with pytest.raises(DataError) as caught:
        image_size(ImageRef(png_header(*size)), source="s", max_pixels=90_000_000)
    assert caught.value.kind == "oversized_image"


def test_pil_warning_range_is_allowed_and_silent():
    """95 million pixels: PIL warns of a bomb, our limit does not object."""
    content = png_header(10_000, 9_500)
    assert image_size(ImageRef(content), source="s") == (10_000, 9_500)


def test_picture_in_memory_over_the_limit_or_empty():
    assert refused(PIL.Image.new("1", (200, 100)), max_pixels=19_999).kind == "oversized_image"
    open_image(ImageRef(PIL.Image.new("1", (200, 100))), source="s", max_pixels=20_000)
    error = refused(PIL.Image.new("RGB", (0, 5)))
    assert (error.kind, "0 x 5 pixels" in error.problem) == ("corrupt_image", True)


def test_unreadable_file_is_a_data_error(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    colourful().save(path)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert refused(path).kind == "corrupt_image"
    assert "Permission denied" in refused(path).problem


def test_files_are_closed(tmp_path):
    path = tmp_path / "a.png"
    colourful().save(path)
    (tmp_path / "broken.png").write_bytes(path.read_bytes()[:900])
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for _ in range(5):
        open_image(ImageRef(path), source="s")
        image_size(ImageRef(path), source="s")
        refused(tmp_path / "broken.png")
    after = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert after == before


def test_warning_filters_are_as_before_also_with_threads():
    before = list(warnings.filters)
    content = saved(colourful("P"), "PNG", transparency=bytes(range(256)))
    failures: list[Exception] = []

    def work():
        try:
            for _ in range(20):
                open_image(ImageRef(content), source="s")
        except Warning as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


def test_jpeg_degradation_is_pils_own_compression():
    image = colourful(size=(64, 48))
    for quality in (75, 88, 100):
        with PIL.Image.open(io.BytesIO(saved(image, "JPEG", quality=quality))) as expected:
            np.testing.assert_array_equal(
                np.asarray(jpeg_degrade(image, quality)), np.asarray(expected)
            )
    assert jpeg_degrade(colourful("RGBA"), 80).mode == "RGB"
    with pytest.raises(DataError, match="70000 x 1") as caught:
        jpeg_degrade(PIL.Image.new("RGB", (70_000, 1)), 80)
    assert caught.value.kind == "oversized_image"


def test_quality_is_uniform_over_both_ends():
    generator = np.random.default_rng(0)
    drawn = np.array([draw_quality(generator) for _ in range(5200)])
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == list(range(75, 101))
    assert (np.abs(counts - 200) < 75).all()  # 5 standard deviations of 14
    assert [draw_quality(np.random.default_rng(4)) for _ in range(2)] == [
        draw_quality(np.random.default_rng(4))
    ] * 2
