"""The right frames of a video are shown: every frame carries its own number in black and white."""

from __future__ import annotations

import pickle
import sys
from itertools import pairwise

import av
import numpy as np
import PIL.Image
import pytest

from cascadevl.data import video as video_module
from cascadevl.data.video import (
    frame_parts,
    inference_indices,
    read_frames,
    training_indices,
)
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, VideoRef

NUM_BITS, BLOCK_PX = 7, 16


def numbered_frame(number: int) -> np.ndarray:
    """A picture whose blocks are the bits of its number."""
    bits = [255 * (number >> bit & 1) for bit in range(NUM_BITS)]
    row = np.repeat(np.array(bits, dtype=np.uint8), BLOCK_PX)
    return np.broadcast_to(row[None, :, None], (BLOCK_PX * 2, len(row), 3)).copy()


def number_of(frame: PIL.Image.Image) -> int:
    assert frame.mode == "RGB"
    assert frame.size == (NUM_BITS * BLOCK_PX, 2 * BLOCK_PX)
    middles = np.asarray(frame)[BLOCK_PX, BLOCK_PX // 2 :: BLOCK_PX, 0]
    return sum(int(middle > 127) << bit for bit, middle in enumerate(middles))


def write_video(path, num_frames, codec, *, rate=10, pix_fmt="yuv420p", gop=12):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = NUM_BITS * BLOCK_PX, 2 * BLOCK_PX
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


FILES = {
    "a.mp4": ("mpeg4", "yuv420p"),
    "b.mp4": ("libx264", "yuv420p"),  # with B-frames: stored in another order than shown
    "c.gif": ("gif", "rgb8"),
    "d.webm": ("libvpx", "yuv420p"),
    "e.avi": ("mjpeg", "yuvj420p"),
    "f.ts": ("mpeg2video", "yuv420p"),  # cannot be searched by time
    "g.h264": ("libx264", "yuv420p"),  # has no time stamps at all
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos")
    for name, (codec, pix_fmt) in FILES.items():
        rate = 25 if name in ("f.ts", "g.h264") else 10
        write_video(path / name, 100, codec, pix_fmt=pix_fmt, rate=rate)
    return path


def numbers_shown(path, **arguments):
    clip_s = arguments.pop("clip_s", None)
    reference = VideoRef(source=path, clip_s=clip_s)
    return [number_of(frame) for frame in read_frames(reference, source="here", **arguments)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("num_frames", [1, 5, 64])
def test_inference_shows_the_frames_of_its_rule(folder, name, num_frames):
    assert numbers_shown(folder / name, num_frames=num_frames) == inference_indices(
        0, 99, num_frames
    )


@pytest.mark.parametrize("name", FILES)
def test_training_shows_the_frames_it_drew(folder, name):
    drawn = np.random.default_rng(5)
    expected = training_indices(0, 99, int(drawn.integers(4, 9, endpoint=True)), drawn)
    shown = numbers_shown(folder / name, num_frames=(4, 9), generator=np.random.default_rng(5))
    assert shown == expected


def test_inference_rule_by_hand():
    # 10 frames, 4 segments of 2.25: 1.125 + 0, 2, 4 (4.5 rounds to even), 7 (6.75).
    assert inference_indices(0, 9, 4) == [1, 3, 5, 8]
    assert inference_indices(0, 99, 1) == [49]
    assert inference_indices(20, 29, 4) == [21, 23, 25, 28]
    assert inference_indices(0, 1, 4) == [0, 0, 0, 1]
    assert inference_indices(0, 0, 3) == [0, 0, 0]


def test_inference_rule_never_leaves_the_video():
    for last in range(40):
        for num_frames in range(1, 70):
            indices = inference_indices(0, last, num_frames)
            assert indices == sorted(indices)
            assert indices[0] >= 0
            assert indices[-1] <= last


def test_training_draws_one_frame_in_each_interval_and_every_frame_sometime():
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        indices = training_indices(3, 22, 4, generator)
        assert [(index - 3) // 5 for index in indices] == [0, 1, 2, 3]
        seen |= set(indices)
    assert seen == set(range(3, 23))  # the last frame of each interval included
    assert training_indices(4, 6, 8, generator) == [4, 5, 6]  # short: each once, none repeated


def test_training_draws_every_number_of_frames():
    path_numbers = {
        len(
            training_indices(
                0,
                99,
                int(np.random.default_rng(seed).integers(2, 4, endpoint=True)),
                np.random.default_rng(seed),
            )
        )
        for seed in range(40)
    }
    assert path_numbers == {2, 3, 4}


def test_read_frames_draws_the_number_of_frames_inclusively(folder):
    counts = {
        len(
            numbers_shown(
                folder / "a.mp4", num_frames=(2, 4), generator=np.random.default_rng(seed)
            )
        )
        for seed in range(20)
    }
    assert counts == {2, 3, 4}
    assert len(numbers_shown(folder / "a.mp4", num_frames=(2, 4))) == 4


def test_clip_limits_the_frames_to_its_seconds(folder):
    shown = numbers_shown(folder / "b.mp4", num_frames=4, clip_s=(2.0, 2.9))
    assert shown == inference_indices(20, 29, 4)
    # An end past the video means its last frame.
    assert numbers_shown(folder / "b.mp4", num_frames=2, clip_s=(9.0, 60.0)) == inference_indices(
        90, 99, 2
    )
    for seed in range(5):
        drawn = numbers_shown(
            folder / "b.mp4", num_frames=6, clip_s=(2.0, 2.9), generator=np.random.default_rng(seed)
        )
        assert all(20 <= number <= 29 for number in drawn)
        assert all(low < high for low, high in pairwise(drawn))


def test_clip_outside_the_video_is_an_error(folder):
    with pytest.raises(
        DataError, match=r"clip 12 s to 15 s lies outside .* 10\.00 s long"
    ) as caught:
        numbers_shown(folder / "a.mp4", num_frames=4, clip_s=(12.0, 15.0))
    assert (caught.value.kind, caught.value.field, caught.value.source) == (
        "bad_clip",
        "clip",
        "here",
    )


def test_short_video(tmp_path):
    path = write_video(tmp_path / "short.mp4", 3, "mpeg4")
    assert numbers_shown(path, num_frames=6) == inference_indices(0, 2, 6)
    assert numbers_shown(path, num_frames=8, generator=np.random.default_rng(0)) == [0, 1, 2]


def test_folder_of_frames_is_read_by_number_not_by_name(tmp_path):
    for number in range(12):
        PIL.Image.fromarray(numbered_frame(number)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert numbers_shown(tmp_path, num_frames=12, generator=np.random.default_rng(0)) == list(
        range(12)
    )
    assert numbers_shown(tmp_path, num_frames=3) == inference_indices(0, 11, 3)
    with pytest.raises(DataError, match="no frame rate") as caught:
        numbers_shown(tmp_path, num_frames=3, clip_s=(0.0, 1.0))
    assert caught.value.kind == "bad_clip"


def test_frames_as_they_stand_in_a_prompt():
    frames = [PIL.Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in (1, 2)]
    parts = frame_parts(frames)
    assert parts == ("Frame-1: ", ImageRef(frames[0]), "\nFrame-2: ", ImageRef(frames[1]))


def test_damaged_videos_are_data_errors(folder, tmp_path):
    whole = (folder / "b.mp4").read_bytes()
    generator = np.random.default_rng(3)
    num_refused = 0
    for number in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, len(whole), 30):
            content[place] = generator.integers(0, 256)
        path = tmp_path / "broken.mp4"
        path.write_bytes(
            bytes(content[: len(content) if number % 2 else generator.integers(len(content))])
        )
        try:
            frames = read_frames(VideoRef(source=path), num_frames=4, source="there")
        except DataError as error:
            assert error.kind in ("corrupt_video", "oversized_image")  # noqa: PT017
            assert error.source == "there"  # noqa: PT017
            num_refused += 1
        else:
            assert len(frames) == 4
    assert num_refused > 30


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("empty.mp4", b"", "corrupt_video"),
        ("text.mp4", b"this is no video at all, only some text\n" * 20, "corrupt_video"),
        ("missing.mp4", None, "missing_video"),
        ("nul\0byte.mp4", None, "missing_video"),
        ("x" * 300 + ".mp4", None, "missing_video"),
    ],
)
def test_files_that_are_no_videos(tmp_path, name, content, kind):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        numbers_shown(path, num_frames=2)
    assert (caught.value.kind, caught.value.field) == (kind, "video")


def test_folders_without_frames_and_addresses(tmp_path):
    with pytest.raises(DataError, match="holds no picture") as caught:
        numbers_shown(tmp_path, num_frames=2)
    assert caught.value.kind == "corrupt_video"
    with pytest.raises(DataError, match="address") as caught:
        numbers_shown(type(tmp_path)("s3://bucket/a.mp4"), num_frames=2)
    assert caught.value.kind == "unsupported_source"


def test_sound_without_pictures_is_corrupt(tmp_path):
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="no picture track"):
        numbers_shown(path, num_frames=2)


def test_frames_too_large_are_refused_before_decoding(folder):
    with pytest.raises(DataError, match="112 x 32, the limit is 1000 pixels") as caught:
        numbers_shown(folder / "a.mp4", num_frames=2, max_pixels=1000)
    assert caught.value.kind == "oversized_image"


def test_seeking_equals_counting(folder, monkeypatch):
    monkeypatch.setattr(video_module, "_decode_in_order", None)  # must not be needed here
    for name in ("a.mp4", "b.mp4", "d.webm", "e.avi"):
        for seed in range(4):
            shown = numbers_shown(
                folder / name, num_frames=7, generator=np.random.default_rng(seed)
            )
            drawn = np.random.default_rng(seed)
            assert shown == training_indices(0, 99, int(drawn.integers(7, 7, endpoint=True)), drawn)


def test_without_pyav_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'cascadevl\[video\]'"):
        numbers_shown(folder / "a.mp4", num_frames=2)


def test_wrong_number_of_frames_is_a_configuration_error(folder):
    for num_frames in (0, (5, 4), (0, 3)):
        with pytest.raises(ConfigError, match="num_frames"):
            numbers_shown(folder / "a.mp4", num_frames=num_frames)


def test_errors_cross_process_borders(tmp_path):
    with pytest.raises(DataError) as caught:
        numbers_shown(tmp_path / "missing.mp4", num_frames=2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.kind == "missing_video"


def test_only_the_stretches_that_hold_wanted_frames_are_decoded(folder, tmp_path):
    """Frames 40 to 60 are destroyed; who shows 24 and 74 need not notice."""
    content = bytearray((folder / "e.avi").read_bytes())
    with av.open(str(folder / "e.avi")) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for place, size in packets[40:61]:
        start = content.index(b"\xff\xd8", place)
        content[start : start + size] = bytes(size)
    path = tmp_path / "hole.avi"
    path.write_bytes(bytes(content))
    assert numbers_shown(path, num_frames=2) == inference_indices(0, 99, 2) == [24, 74]
    with pytest.raises(DataError) as caught:
        numbers_shown(path, num_frames=1)  # frame 49
    assert caught.value.kind == "corrupt_video"
