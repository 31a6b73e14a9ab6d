"""The pictures of one sample: opened, degraded where training wants it, and cut into tiles.

Everything random here is a function of names and a seed, so that the same record gives the same
pixels in any process and in any order.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from cascadevl.data.image import draw_quality, jpeg_degrade, open_image
from cascadevl.data.tiling import TilingConfig, tile_image
from cascadevl.data.video import frame_parts, read_frames
from cascadevl.sequence import INCREMENTS
from cascadevl.types import ImageRef, Message, Part, VideoRef


def generator_for(seed: int, *names: str | int) -> np.random.Generator:
    """A random generator that depends on its arguments alone, in every process and version.

    Args:
        seed: The run's seed.
        names: What it is for, such as data set, record id, epoch and purpose.
    """
    key = "\x1f".join(str(name) for name in (seed, *names))
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


@dataclass(frozen=True, slots=True)
class Draw:
    """Whose random draws these are.

    Attributes:
        seed: The run's seed.
        names: Data set, record id and epoch.
    """

    seed: int
    names: tuple[str | int, ...]

    def generator(self, *purpose: str | int) -> np.random.Generator:
        """The generator for one purpose, independent of those for others.

        Args:
            *purpose: What is drawn, and for which picture.
        """
        return generator_for(self.seed, *self.names, *purpose)

    def in_epoch(self, epoch: int) -> Draw:
        """The draws of the same record in another epoch.

        Args:
            epoch: How often its data set was seen before.
        """
        return replace(self, names=(*self.names[:-1], epoch))


@dataclass(slots=True)
class Pictures:
    """Opens the pictures of one sample, in the order they are shown.

    Attributes:
        tiling: Limits of each picture of this sample.
        source: Named in errors.
        augment: Whether pictures, but never frames of a video, are degraded by JPEG compression.
        num_frames: Fewest and most frames of a video.
        draw: None at inference, where nothing is random and a video shows the most frames.
        tiles: Tiles of the pictures shown so far; each frame of a video is one.
        owners: For each of them, which picture or video it is of.
    """

    tiling: TilingConfig
    source: str
    augment: bool
    num_frames: tuple[int, int]
    draw: Draw | None
    tiles: list[UInt8[np.ndarray, "_ px px 3"]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def show(self, message: Message) -> Message:
        """Tile the pictures of a turn.

        Args:
            message: The turn.

        Returns:
            The turn with its videos taken apart into frames.

        Raises:
            DataError: If a picture or video cannot be used.
        """
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, ImageRef):
                self._add_image(part)
                parts.append(part)
            elif isinstance(part, VideoRef):
                parts += self._add_video(part)
            else:
                parts.append(part)
        return replace(message, parts=tuple(parts))

    def _add_image(self, ref: ImageRef) -> None:
        image = open_image(ref, source=self.source)
        if self.augment and self.draw is not None:
            image = jpeg_degrade(image, draw_quality(self.draw.generator("jpeg", len(self.tiles))))
        self._add([tile_image(image, self.tiling)])

    def _add_video(self, video: VideoRef) -> tuple[Part, ...]:
        """Frames as released training shows them: one tile each, one line each."""
        frames = read_frames(
            video,
            num_frames=self.num_frames,
            generator=self.draw.generator("frames", len(self.tiles)) if self.draw else None,
            source=self.source,
        )
        whole = replace(self.tiling, min_tiles=1, max_tiles=1, thumbnail=False)
        self._add([tile_image(frame, whole) for frame in frames])
        return frame_parts(frames)

    def _add(self, tiles: list[UInt8[np.ndarray, "_ px px 3"]]) -> None:
        """Take up a picture, or all frames of a video."""
        self.owners += [max(self.owners, default=-1) + 1] * len(tiles)
        self.tiles += tiles

    def increments(self, rule: float | Literal["random"]) -> tuple[float, ...]:
        """Position step of each picture's visual tokens (V2PE, InternVL3 report, eqs. 3 and 4).

        Drawn at random, it is one for each picture and one for all frames of a video: the frames
        show one thing, and at inference they have one increment too (docs/concepts/positions).

        Args:
            rule: One number for all, or ``"random"``.

        Returns:
            One an entry of ``tiles``; none at inference, where the model's configuration decides.
        """
        if self.draw is None:
            return ()
        if rule != "random":
            return (float(rule),) * len(self.tiles)
        num_owners = max(self.owners, default=-1) + 1
        drawn = self.draw.generator("increment").choice(INCREMENTS, size=num_owners)
        return tuple(float(drawn[owner]) for owner in self.owners)

    def compressed(self, probability: float, draw: Draw, *, mixed: float = 0.0) -> tuple[bool, ...]:
        """Which tiles are compressed (ViCO, InternVL3.5 report).

        As with increments, the frames of a video share what is drawn.

        Args:
            probability: Of a picture to have all its tiles compressed; otherwise none is.
            draw: Whose draw it is; that of the epoch, also where the pictures are of another.
            mixed: Probability that the tiles of a picture are compressed each by itself instead,
                with a probability that is drawn for the picture, evenly from 0 to 1.

        Returns:
            One a tile, picture after picture.
        """
        num_owners = max(self.owners, default=-1) + 1
        share = (draw.generator("compression").random(num_owners) < probability).astype(np.float64)
        owners = np.repeat(np.array(self.owners, dtype=np.int64), [len(t) for t in self.tiles])
        if not mixed:
            return tuple((share[owners] > 0).tolist())
        generator = draw.generator("compression of tiles")
        is_mixed = generator.random(num_owners) < mixed
        share = np.where(is_mixed, generator.random(num_owners), share)
        return tuple((generator.random(len(owners)) < share[owners]).tolist())
