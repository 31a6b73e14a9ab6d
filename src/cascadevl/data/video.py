"""Frames of a video: which ones, and how they are read.

Two rules of choice, as the public material has them: training draws at random, so that a model
sees other frames every epoch, inference takes the middles of equal segments. Files are read by
PyAV (extra ``video``); a folder of frames needs nothing but PIL.

The training draw mends three quirks of the released code: the last frame of every interval can
be drawn; where there are fewer frames than were asked for, each is shown once instead of the
last being repeated; and no fall-back to a random permutation exists.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from cascadevl.data.image import MAX_PIXELS, open_image, reject_url
from cascadevl.errors import ConfigError, DataError
from cascadevl.types import ImageRef, Part, VideoRef

if TYPE_CHECKING:
    import av
    import av.container

MIN_FRAMES, MAX_FRAMES = 8, 32
"""Frames drawn in training (released scripts: min_num_frame, max_num_frame)."""

_FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


def training_indices(
    first: int, last: int, num_frames: int, generator: np.random.Generator
) -> list[int]:
    """One random frame in each of ``num_frames`` equal intervals.

    Args:
        first: First frame that may be shown.
        last: Last frame that may be shown.
        num_frames: Frames wanted; with fewer in the video each is taken once.
        generator: Source of randomness.

    Returns:
        Rising frame numbers, all different.
    """
    total = last - first + 1
    borders = np.linspace(0, total, min(num_frames, total) + 1).astype(int).tolist()
    return [first + int(generator.integers(start, stop)) for start, stop in pairwise(borders)]


def inference_indices(first: int, last: int, num_frames: int) -> list[int]:
    """The middle frame of each of ``num_frames`` equal segments, as the model cards do it.

    ``index_i = int(first + segment / 2 + round(segment * i))`` with
    ``segment = (last - first) / num_frames``; a video with fewer frames shows some twice, as
    released.

    Args:
        first: First frame that may be shown.
        last: Last frame that may be shown.
        num_frames: Frames wanted.
    """
    segment = (last - first) / num_frames
    return [int(first + segment / 2 + round(segment * number)) for number in range(num_frames)]


def read_frames(
    video: VideoRef,
    *,
    num_frames: int | tuple[int, int],
    generator: np.random.Generator | None = None,
    source: str,
    max_pixels: int = MAX_PIXELS,
) -> list[PIL.Image.Image]:
    """Choose and read the frames of a video.

    Args:
        video: The video, and the part of it that counts.
        num_frames: How many frames, or the fewest and the most: training draws a number between
            them (both included), inference takes the most.
        generator: Source of randomness for training; None chooses by the rule of inference.
        source: Where the reference stands, named in errors.
        max_pixels: Largest frame that is decoded.

    Returns:
        RGB frames in their order in time.

    Raises:
        DataError: Of kind ``missing_video``, ``corrupt_video``, ``bad_clip``, ``oversized_image``
            or ``unsupported_source``; for a folder also those of `open_image`.
        ConfigError: If ``num_frames`` makes no sense, or PyAV is not installed.
    """
    fewest, most = (num_frames, num_frames) if isinstance(num_frames, int) else num_frames
    if not 1 <= fewest <= most:
        raise ConfigError(f"num_frames is {num_frames}, but 1 <= fewest <= most must hold")
    wanted = most if generator is None else int(generator.integers(fewest, most, endpoint=True))

    def choose(first: int, last: int) -> list[int]:
        if generator is None:
            return inference_indices(first, last, wanted)
        return training_indices(first, last, wanted, generator)

    path = check_video(video, source=source)
    if path.is_dir():
        files = _frame_files(path, video, source)
        return [
            open_image(ImageRef(files[index]), source=source, max_pixels=max_pixels)
            for index in choose(0, len(files) - 1)
        ]
    with _opened(path, source) as container:
        index = _index(container, path, source)
        indices = choose(*_clip_range(video.clip_s, index, path, source))
    with _opened(path, source) as container:
        return _decode(container, index, indices, path=path, source=source, max_pixels=max_pixels)


def video_extent(video: VideoRef, *, source: str) -> tuple[int, int]:
    """Pixels of a frame, and the number of frames, found without decoding one.

    Args:
        video: The video, a file.
        source: Where the reference stands, named in errors.

    Raises:
        DataError: Of kind ``missing_video``, ``corrupt_video`` or ``unsupported_source``.
    """
    path = check_video(video, source=source)
    with _opened(path, source) as container:
        stream = container.streams.video[0]
        return stream.width * stream.height, _index(container, path, source).num_frames


def frame_parts(frames: Sequence[PIL.Image.Image]) -> tuple[Part, ...]:
    r"""What stands in a prompt for a video: ``Frame-1: <image>\nFrame-2: <image>``.

    No line break follows the last frame: in a record the text after the video's mark brings it.

    Args:
        frames: The frames in their order in time.
    """
    parts: list[Part] = []
    for number, frame in enumerate(frames, start=1):
        parts += [f"{'' if number == 1 else chr(10)}Frame-{number}: ", ImageRef(frame)]
    return tuple(parts)


def check_video(video: VideoRef, *, source: str) -> Path:
    """The video's path, once it is known to be there; nothing is opened.

    Args:
        video: The video.
        source: Where the reference stands, named in errors.

    Raises:
        DataError: Of kind ``missing_video`` or ``unsupported_source``.
    """
    reject_url(str(video.source), source=source, field="video")
    try:
        if video.source.exists():
            return video.source
        problem = "does not exist"
    except (OSError, ValueError) as error:
        problem = f"cannot be reached ({error})"
    raise DataError(
        f"the video {str(video.source)!r} {problem}",
        kind="missing_video",
        source=source,
        field="video",
        remedy="check the path and the data set's root folder",
    )


def _frame_files(folder: Path, video: VideoRef, source: str) -> list[Path]:
    """The pictures of a folder, by the number at the end of their names, then by name."""
    if video.clip_s is not None:
        raise DataError(
            f"a clip in seconds is given, but the folder {str(folder)!r} has no frame rate",
            kind="bad_clip",
            source=source,
            field="clip",
            remedy="remove the clip, or keep only its frames in the folder",
        )

    def place(file: Path) -> tuple[int, str]:
        number = re.search(r"\d+$", file.stem)
        return (int(number.group()) if number else -1, file.name)

    try:
        found = [file for file in folder.iterdir() if file.suffix.lower() in _FRAME_SUFFIXES]
    except OSError as error:
        raise _corrupt(folder, f"its folder cannot be read ({error})", source) from error
    if not found:
        suffixes = " ".join(sorted(_FRAME_SUFFIXES))
        raise _corrupt(folder, f"its folder holds no picture ({suffixes})", source)
    return sorted(found, key=place)


@dataclass(frozen=True, slots=True)
class _Index:
    """What a video holds, found without decoding it.

    Attributes:
        num_frames: Number of frames.
        frames_per_s: Frame rate, or None where the file names none.
        times: Time stamp of each frame in order; empty where the file does not give every frame
            one of its own.
        keyframes: Numbers of the frames from which decoding can start, ascending.
    """

    num_frames: int
    frames_per_s: float | None
    times: tuple[int, ...]
    keyframes: tuple[int, ...]


def _index(container: av.container.InputContainer, path: Path, source: str) -> _Index:
    stream = container.streams.video[0]
    with _decoding(path, source):
        # Counted, not read from the header: containers leave the number out or have it wrong.
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size > 0 and not packet.is_discard
        ]
    if not packets:
        raise _corrupt(path, "it holds no frame", source)
    times, keyframes = sorted({time for time, _ in packets if time is not None}), []
    if len(times) == len(packets):
        keyframes = [number for number, (_, key) in enumerate(sorted(packets)) if key]
    else:
        times = []
    rate = stream.average_rate or stream.guessed_rate
    return _Index(len(packets), float(rate) if rate else None, tuple(times), tuple(keyframes))


def _clip_range(
    clip_s: tuple[float, float] | None, index: _Index, path: Path, source: str
) -> tuple[int, int]:
    last = index.num_frames - 1
    if clip_s is None:
        return 0, last
    if index.frames_per_s is None:
        raise DataError(
            f"a clip in seconds is given, but {str(path)!r} names no frame rate",
            kind="bad_clip",
            source=source,
            field="clip",
            remedy="remove the clip, or write the video again with a frame rate",
        )
    start, end = (round(second * index.frames_per_s) for second in clip_s)
    if start > last or end < start:
        length_s = index.num_frames / index.frames_per_s
        raise DataError(
            f"the clip {clip_s[0]:g} s to {clip_s[1]:g} s lies outside {str(path)!r}, "
            f"which is {length_s:.2f} s long",
            kind="bad_clip",
            source=source,
            field="clip",
            remedy="give start and end in seconds within the video",
        )
    return max(0, start), min(end, last)


def _decode(
    container: av.container.InputContainer,
    index: _Index,
    indices: list[int],
    *,
    path: Path,
    source: str,
    max_pixels: int,
) -> list[PIL.Image.Image]:
    """Decode the frames wanted, of a long video only the stretches that hold them."""
    stream = container.streams.video[0]
    if stream.width * stream.height > max_pixels:
        raise DataError(
            f"the frames of {str(path)!r} are too large: {stream.width} x {stream.height}, the "
            f"limit is {max_pixels} pixels",
            kind="oversized_image",
            source=source,
            field="video",
            remedy="make the video smaller, or raise max_pixels if it can be trusted",
        )
    wanted = sorted(set(indices))
    with _decoding(path, source):
        pictures = _decode_from_keyframes(container, index, wanted)
    if len(pictures) < len(wanted):  # the file cannot be searched by time: count from its start
        with _opened(path, source) as again, _decoding(path, source):
            pictures = _decode_in_order(again, wanted)
    if len(pictures) < len(wanted):
        missing = [number for number in wanted if number not in pictures]
        raise _corrupt(path, f"frames {missing} of it cannot be decoded", source)
    return [pictures[number] for number in indices]


def _decode_from_keyframes(
    container: av.container.InputContainer, index: _Index, wanted: list[int]
) -> dict[int, PIL.Image.Image]:
    """Frames found by their time stamps; fewer than wanted where these do not lead to them."""
    pictures: dict[int, PIL.Image.Image] = {}
    stream = container.streams.video[0]
    largest = stream.width * stream.height or MAX_PIXELS
    numbers = {time: number for number, time in enumerate(index.times)}
    frames: Iterator[av.VideoFrame] = iter(())
    position = -1
    for number in wanted:
        place = bisect_right(index.keyframes, number) - 1
        if place < 0:
            return pictures
        start = index.keyframes[place]
        if start > position:
            try:
                container.seek(index.times[start], stream=stream)
            except _pyav().FFmpegError:  # an unseekable file can still be read from its start
                return pictures
            frames = container.decode(stream)
        for frame in frames:
            position = numbers.get(frame.pts, index.num_frames)
            if position >= number:
                break
        if position != number:
            return pictures
        pictures[number] = _picture(frame, largest)
    return pictures


def _decode_in_order(
    container: av.container.InputContainer, wanted: list[int]
) -> dict[int, PIL.Image.Image]:
    """Frames found by counting from the first."""
    pictures: dict[int, PIL.Image.Image] = {}
    stream = container.streams.video[0]
    largest = stream.width * stream.height or MAX_PIXELS
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            pictures[number] = _picture(frame, largest)
        if number == wanted[-1]:
            break
    return pictures


def _picture(frame: av.VideoFrame, largest: int) -> PIL.Image.Image:
    """A frame, unless it is larger than the header, which was checked, said that frames are."""
    if frame.width * frame.height > largest:
        raise ValueError(f"a frame is {frame.width} x {frame.height}, larger than the header says")
    picture: PIL.Image.Image = frame.to_image()
    return picture


@contextmanager
def _opened(path: Path, source: str) -> Iterator[av.container.InputContainer]:
    av = _pyav()
    with _decoding(path, source):
        container = av.open(str(path))
    with container:
        if not container.streams.video:
            raise _corrupt(path, "it holds no picture track", source)
        if container.streams.video[0].codec_context is None:
            raise _corrupt(path, "its coding is unknown to FFmpeg, or its header damaged", source)
        yield container


@contextmanager
def _decoding(path: Path, source: str) -> Iterator[None]:
    """Turn what FFmpeg raises on damaged data into a `DataError`."""
    av = _pyav()
    try:
        yield
    except (av.FFmpegError, OSError, ValueError) as error:
        raise _corrupt(path, f"it cannot be decoded ({error})", source) from error


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "videos are read by PyAV, which is not installed; pip install 'cascadevl[video]'"
        ) from error
    module: ModuleType = av
    return module


def _corrupt(path: Path, problem: str, source: str) -> DataError:
    return DataError(
        f"the video {str(path)!r} cannot be used: {problem}",
        kind="corrupt_video",
        source=source,
        field="video",
        remedy="replace the file or remove the record",
    )
