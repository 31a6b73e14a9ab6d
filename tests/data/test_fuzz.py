"""Thousands of damaged records and pictures: only `DataError` comes out, and no warning.

pytest turns warnings into errors, and its timeout ends a hang. All damage is seeded.
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections import Counter

import numpy as np
import PIL.Image
import pytest

from cascadevl.data.image import image_size, open_image
from cascadevl.data.json_text import decode_json
from cascadevl.data.meta import DatasetSpec, read_meta
from cascadevl.data.parsing import parse_record
from cascadevl.data.records import JsonlSource
from cascadevl.errors import DataError
from cascadevl.types import ImageRef, Record

MAX_PIXELS = 4_000_000


def turns(*pairs):
    names = {"h": "human", "g": "gpt", "s": "system", "f": "function", "p": "pretrain"}
    return [{"from": names[who], "value": text} for who, text in pairs]


WHOLE_RECORDS = [
    {"id": 0, "conversations": turns(("h", "hi"), ("g", "hello"))},
    {
        "id": "x",
        "image": "a.png",
        "width": 3,
        "conversations": turns(("h", "<image>\n?"), ("g", ".")),
    },
    {
        "image": ["a.png", "b.png"],
        "conversations": turns(("s", "s"), ("h", "<image> <image>"), ("g", ".")),
    },
    {"image": ["a.png"], "conversations": turns(("p", "one <image> two"))},
    {"video": "v.mp4", "clip": [0.5, 3], "conversations": turns(("h", "<video>\n?"), ("g", "."))},
    {"conversations": turns(("h", "?"), ("g", "call"), ("f", "12"), ("g", "noon"))},
    {
        "images": [{"bytes": None, "path": "a.png"}],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "."},
        ],
    },
]

STRANGE_VALUES = [
    None, True, False, 0, -1, 10**400, 1.5, math.nan, math.inf, "", " ", "\x00", "\ud800",
    "<image>", "<video>", "s3://a/b", "a" * 5000, "../" * 50, [], [[]], [None], {}, {"": {}},
    {"path": 5}, {"bytes": "x"},
    ["a.png"] * 9, [0, math.nan], {"from": "gpt", "value": "."},
    [{"from": "human", "value": "<image>"}],
]  # fmt: skip


def places(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def damaged(fields, generator):
    """A copy in which some values are replaced, removed, doubled or renamed."""
    fields = copy.deepcopy(fields)
    for _ in range(generator.integers(1, 4)):
        paths = [path for path in places(fields) if path]
        if not paths:
            break
        path = paths[generator.integers(len(paths))]
        parent = fields
        for key in path[:-1]:
            parent = parent[key]
        strange = copy.deepcopy(STRANGE_VALUES[generator.integers(len(STRANGE_VALUES))])
        action = generator.integers(5)
        if action == 0:
            del parent[path[-1]]
        elif action == 1 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        elif action == 1:
            parent[str(path[-1])[:-1]] = parent.pop(path[-1])
        elif action == 2 and isinstance(parent[path[-1]], str):
            parent[path[-1]] += ["<image>", "<video>", "\x00", "\udfff"][generator.integers(4)]
        else:
            parent[path[-1]] = strange
    return fields


def damaged_bytes(content, generator):
    """A copy that is cut, flipped, overwritten, shortened or lengthened somewhere."""
    damaged = bytearray(content)
    size, action = len(damaged), generator.integers(7)
    place = int(generator.integers(size))
    if action == 0:
        return bytes(damaged[:place])
    if action == 1:
        for each in generator.integers(0, size, generator.integers(1, 4)):
            damaged[each] ^= 1 << generator.integers(8)
    elif action == 2:  # headers hold sizes, types and offsets
        for each in generator.integers(0, min(64, size), generator.integers(1, 4)):
            damaged[each] = generator.choice([0, 1, 127, 128, 255])
    elif action == 3:
        del damaged[place : place + int(generator.integers(1, 200))]
    elif action == 4:
        damaged[place:place] = generator.bytes(int(generator.integers(1, 64)))
    elif action == 5:
        numbers = [
            b"\xff" * 4,
            b"\0" * 4,
            b"\x7f\xff\xff\xff",
            b"\xff\xff\xff\x7f",
            b"\0\0\xff\xff",
        ]
        damaged[place : place + 4] = numbers[generator.integers(len(numbers))]
    else:
        for each in generator.integers(0, size, generator.integers(5, 60)):
            damaged[each] = generator.integers(256)
    return bytes(damaged)


def outcome(attempt):
    """``ok``, or the kind of the `DataError`, whose text is complete; all else falls through."""
    try:
        attempt()
    except DataError as error:
        assert error.remedy  # noqa: PT017
        assert str(error).encode()  # noqa: PT017 - printable, even where the data is not
        assert len(str(error)) < 12_000  # noqa: PT017
        return error.kind
    return "ok"


def test_whole_records_pass():
    for fields in WHOLE_RECORDS:
        record = parse_record(decode_json(json.dumps(fields).encode(), source="s"), source="s")
        assert isinstance(record, Record)


def test_damaged_records():
    generator = np.random.default_rng(1)
    counts = Counter()
    for number in range(4000):
        fields = damaged(WHOLE_RECORDS[number % len(WHOLE_RECORDS)], generator)
        counts[outcome(lambda fields=fields: parse_record(fields, source="s"))] += 1
    assert counts["ok"] > 150  # harmless damage, such as an unknown key, is no error
    expected = {
        "bad_field",
        "bad_role",
        "bad_turns",
        "image_count",
        "video_count",
        "bad_clip",
        "unsupported_source",
    }
    assert expected <= counts.keys()
    assert sum(counts.values()) == 4000


def test_damaged_lines(tmp_path):
    generator = np.random.default_rng(2)
    whole = [json.dumps(fields).encode() for fields in WHOLE_RECORDS]
    lines = [
        damaged_bytes(whole[n % len(whole)], generator).replace(b"\n", b" ") for n in range(2500)
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    source = JsonlSource(DatasetSpec(name="s", annotation=path, root=tmp_path))
    assert len(source) > 2400
    counts = Counter(outcome(lambda index=index: source[index]) for index in range(len(source)))
    assert counts["invalid_json"] > 1000
    assert counts["ok"] > 15


def test_damaged_meta_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    whole = {
        "a": {
            "root": "",
            "annotation": "a.jsonl",
            "repeat_time": 1,
            "data_augment": True,
            "length": 3,
        },
        "b": {"annotation": "a.jsonl", "max_dynamic_patch": 6, "repeat_time": 0.5},
    }
    path = tmp_path / "meta.json"
    generator = np.random.default_rng(3)
    counts = Counter()
    for number in range(600):
        content = json.dumps(damaged(whole, generator) if number % 2 else whole).encode()
        path.write_bytes(content if number % 2 else damaged_bytes(content, generator))
        counts[outcome(lambda: read_meta(path))] += 1
    assert {"ok", "bad_meta", "invalid_json", "missing_file"} <= counts.keys()
    path.write_text(json.dumps(whole))
    assert [spec.name for spec in read_meta(path)] == ["a", "b"]


def whole_pictures():
    """A small picture in every format that is read, in its usual varieties."""
    generator = np.random.default_rng(4)
    image = PIL.Image.fromarray(generator.integers(0, 256, (24, 31, 4), dtype=np.uint8), "RGBA")
    rgb, turned = image.convert("RGB"), image.convert("RGB").rotate(90)
    exif = PIL.Image.Exif()
    exif[0x010F] = "maker"
    several = {"save_all": True, "append_images": [turned]}
    plans = [
        *[("PNG", mode, {}) for mode in ("RGB", "P", "L", "1", "RGBA", "LA")],
        ("PNG", "P", {"transparency": bytes(range(256))}),
        ("PNG", "RGB", several),
        *[("JPEG", mode, {"exif": exif}) for mode in ("RGB", "L", "CMYK")],
        ("JPEG", "RGB", {"progressive": True}),
        ("MPO", "RGB", several),
        ("GIF", "P", {}),
        ("GIF", "RGB", several),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGB", several),
        *[("BMP", mode, {}) for mode in ("RGB", "P", "L", "1")],
        ("DIB", "RGB", {}),
        *[("TIFF", mode, {}) for mode in ("RGB", "P", "L", "1", "CMYK", "F", "I;16")],
        *[
            ("TIFF", "RGB", {"compression": name})
            for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ],
        ("JPEG2000", "RGB", {}),
        ("JPEG2000", "RGBA", {}),
        *[("PPM", mode, {}) for mode in ("RGB", "L", "1")],
    ]
    for file_format, mode, options in plans:
        file = io.BytesIO()
        picture = (
            rgb if mode == "RGB" else image.convert("L") if mode == "I;16" else image.convert(mode)
        )
        picture = picture.convert("I").convert("I;16") if mode == "I;16" else picture
        picture.save(file, format=file_format, **options)
        yield f"{file_format} {mode} {sorted(options)}", file.getvalue()


def test_whole_pictures_pass():
    for name, content in whole_pictures():
        opened = open_image(ImageRef(content), source=name, max_pixels=MAX_PIXELS)
        assert (opened.mode, opened.size) == ("RGB", (31, 24)), name


@pytest.mark.parametrize("seed", range(4))
def test_damaged_pictures(seed):
    generator = np.random.default_rng(100 + seed)
    whole = [content for _, content in whole_pictures()]
    counts = Counter()
    for number in range(1000):
        reference = ImageRef(damaged_bytes(whole[number % len(whole)], generator))
        of_header = outcome(
            lambda ref=reference: image_size(ref, source="s", max_pixels=MAX_PIXELS)
        )
        of_all = outcome(lambda ref=reference: open_image(ref, source="s", max_pixels=MAX_PIXELS))
        # What the header alone shows, decoding shows too; only broken pixels are found later.
        assert of_all == of_header or (of_header, of_all) == ("ok", "corrupt_image")
        counts[of_all] += 1
    assert counts["ok"] > 200
    assert counts["corrupt_image"] > 200
    assert counts["unsupported_image"] > 100
    assert counts.keys() <= {"ok", "corrupt_image", "unsupported_image", "oversized_image"}


def test_huge_sizes_in_headers_are_not_decoded():
    """The size fields of PNG, GIF, BMP, PPM and WEBP set to the most they can hold."""
    pictures = dict(whole_pictures())
    edits = {
        "PNG RGB []": (16, b"\x7f\xff\xff\xff" * 2),
        "GIF P []": (6, b"\xff\xff" * 2),
        "BMP RGB []": (18, b"\xff\xff\xff\x7f" * 2),
        "PPM RGB []": (3, b"99999 99999\n255\n"),
        "DIB RGB []": (4, b"\xff\xff\x00\x00" * 2),
    }
    for name, (place, size) in edits.items():
        content = bytearray(pictures[name])
        content[place : place + len(size)] = size
        reference = ImageRef(bytes(content))
        kind = outcome(lambda ref=reference: open_image(ref, source="s"))
        assert kind in ("oversized_image", "corrupt_image", "unsupported_image"), name
        if name != "PNG RGB []":  # its checksum no longer fits, which is found first
            assert kind == "oversized_image", name
