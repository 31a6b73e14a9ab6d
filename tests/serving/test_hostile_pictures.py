"""Pictures and videos made to do harm: each is refused or answered, and nobody waits."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

import pytest
from tests.engine.small_talk import picture
from tests.serving.small_server import Served, besieged, check_reply, send_media, small_pair

MODEL, PROCESSOR = small_pair()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with besieged(MODEL, PROCESSOR) as server:
        yield server


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def tiff(width: int, height: int, next_: int = 0) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (279, 2**31)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\x00\x08\x00\x00\x00"
        + struct.pack("<H", len(tags))
        + entries
        + struct.pack("<I", next_)
    )


PIXELS = chunk(b"IDAT", zlib.compress(bytes(2_000_000)))
PICTURES: dict[str, bytes] = {
    "nothing": b"",
    "zeros": bytes(1000),
    "many pixels": png(60_000, 60_000, PIXELS),
    "a wide line": png(90_000_000, 1, PIXELS),
    "no pixels": png(0, 0),
    "the largest numbers": png(2**31 - 1, 2**31 - 1, PIXELS),
    "no content": png(100, 100),
    "less than promised": png(5000, 5000, chunk(b"IDAT", zlib.compress(bytes(10)))),
    "more than promised": png(1, 1, PIXELS),
    "text that unpacks": png(
        4, 4, chunk(b"zTXt", b"a\x00\x00" + zlib.compress(bytes(200_000_000), 9)), PIXELS
    ),
    "a profile that unpacks": png(
        4, 4, chunk(b"iCCP", b"a\x00\x00" + zlib.compress(bytes(200_000_000), 9)), PIXELS
    ),
    "many chunks": png(4, 4, *[chunk(b"tEXt", b"a\x00b")] * 50_000),
    "frames that are not there": png(4, 4, chunk(b"acTL", struct.pack(">II", 2**31, 0)), PIXELS),
    "a strange depth": png(4, 4, PIXELS, depth=3, colour=7),
    "a frame larger than its screen": gif((1, 1), (65_535, 65_535)),
    "a large screen": gif((65_535, 65_535), (1, 1)),
    "a large map of pixels": tiff(2**20, 2**20),
    "a directory that points to itself": tiff(4, 4, next_=8),
    "BMP upside down": b"BM" + struct.pack("<IHHIIiiHHI", 70, 0, 0, 54, 40, 9, -(2**31), 1, 24, 0),
    "PPM of many digits": b"P6 " + b"9" * 100_000 + b" 1 255\n",
    "PPM large": b"P6 100000 100000 255\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
    "SVG": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "HTML": b"<html><script>alert(1)</script></html>",
    "an archive": b"PK\x03\x04" + bytes(30),
    "a JPEG of 65535 squared": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x11\x00"
    b"\x02\x11\x01\x03\x11\x01\xff\xd9",
    "a playlist": b"#EXTM3U\nfile:///etc/passwd\nhttp://127.0.0.1/\n",
}


@pytest.mark.parametrize("content", PICTURES.values(), ids=PICTURES)
def test_pictures_made_to_do_harm(served: Served, content: bytes):
    status, reply = send_media(served, content)
    check_reply(status, reply)


VIDEOS = ("a playlist", "zeros", "HTML", "a frame larger than its screen", "nothing", "SVG")


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_made_to_do_harm(served: Served, name: str):
    status, reply = send_media(served, PICTURES[name], "video")
    assert status == 400 or PICTURES[name].startswith(b"GIF")
    check_reply(status, reply)
    assert b"/tmp" not in reply


FORMATS = ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "jpeg2000", "avif")


def damaged(format_: str, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    picture(rng.randrange(9), (40, 30)).save(buffer, format_)
    content = bytearray(buffer.getvalue())
    for _ in range(rng.randrange(1, 12)):
        place = rng.randrange(min(len(content), 200) if rng.random() < 0.7 else len(content))
        content[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    return bytes(content)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("number", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_pictures_of_every_format(served: Served, format_: str, number: int):
    rng = random.Random(format_)
    statuses = set()
    for _ in range(number):
        status, reply = send_media(served, damaged(format_, rng))
        check_reply(status, reply)
        statuses.add(status)
    assert 400 in statuses or format_ in ("bmp", "ppm"), "nothing was damaged enough to be noticed"


def test_after_all_those_pictures_it_answers(served: Served):
    buffer = io.BytesIO()
    picture(1).save(buffer, "png")
    assert send_media(served, buffer.getvalue())[0] == 200
    assert served.api.answers.failure is None
