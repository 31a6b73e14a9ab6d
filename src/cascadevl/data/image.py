"""Opening pictures safely: every way a file can be bad becomes a `DataError` that says how.

The picture itself is what the released code sees: PIL's decoding and its ``convert("RGB")``,
without applying an EXIF orientation, the first frame of an animation, transparency dropped, and
16-bit grey clipped to 8 bits as PIL does. What is added are limits (size is checked in the
header, before a pixel is decoded) and errors a person can act on.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import PIL.Image

from cascadevl.errors import DataError
from cascadevl.types import ImageRef

MAX_PIXELS = 178_956_970
"""Largest picture opened by default: where PIL itself sees a decompression bomb."""

JPEG_QUALITIES = (75, 100)
"""Range of random JPEG compression in training, both ends included (released code)."""

# Only formats decoded inside the process and found by their first bytes. PIL would otherwise
# start Ghostscript for EPS, and take almost any bytes for a TGA.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF")

# What PIL's decoders let through on damaged files, found by fuzzing (tests/data/test_fuzz.py):
# RuntimeError comes from AVIF, TypeError from TIFF tags of an unexpected type, MemoryError from
# lines of pixels that are longer than a codec can hold.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, TypeError, MemoryError)

_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+:/")


class _QuietPil:
    """Keeps PIL's warnings about metadata and sizes from leaking, also from several threads.

    PIL warns of odd EXIF and TIFF tags, which nothing here reads, and of large pictures, for
    which `open_image` has its own limit. `warnings.catch_warnings` alone is not safe in threads:
    so the first thread to enter saves the filters and the last to leave restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._depth == 0:
                self._saved.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            self._depth += 1
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if self._depth == 0:
                    self._saved.close()


_quiet_pil = _QuietPil()


def open_image(
    ref: ImageRef, *, source: str, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> PIL.Image.Image:
    """Open a picture as RGB.

    Args:
        ref: A file, the bytes of one, or a picture already open.
        source: Where the reference stands, named in errors.
        root: Folder that a relative path starts from. The path is joined as the released code
            joins it: an absolute path, or one with ``..``, leads out of the folder.
        max_pixels: Largest width x height that is decoded. PIL's own limit, twice
            ``PIL.Image.MAX_IMAGE_PIXELS``, applies as well.

    Returns:
        A picture of mode RGB that no longer depends on its file.

    Raises:
        DataError: Of kind ``missing_image``, ``unsupported_source`` (an URL), ``unsupported_image``
            (no known format), ``corrupt_image`` or ``oversized_image``.
    """
    where = _describe(ref, root)
    with _opened(ref, source=source, root=root, max_pixels=max_pixels) as picture:
        try:
            return picture.convert("RGB")
        except PIL.Image.DecompressionBombError as error:
            raise _oversized(where, str(error).rstrip("."), source) from error
        except _DECODING_ERRORS as error:
            raise _corrupt(where, error, source) from error


def image_size(
    ref: ImageRef, *, source: str, root: Path | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height in pixels, read from the header alone.

    Args:
        ref: A file, the bytes of one, or a picture already open.
        source: Where the reference stands, named in errors.
        root: Folder that a relative path starts from.
        max_pixels: As in `open_image`.

    Raises:
        DataError: As `open_image`, as far as the header shows it.
    """
    with _opened(ref, source=source, root=root, max_pixels=max_pixels) as picture:
        return picture.size


@contextmanager
def _opened(
    ref: ImageRef, *, source: str, root: Path | None, max_pixels: int
) -> Iterator[PIL.Image.Image]:
    """The picture with its header read and checked, its pixels not decoded yet."""
    where = _describe(ref, root)
    with ExitStack() as stack:
        stack.enter_context(_quiet_pil())
        if isinstance(ref.source, PIL.Image.Image):
            picture = ref.source
        else:
            file = _bytes_of(ref.source, root=root, source=source)
            picture = stack.enter_context(_header(file, where=where, source=source))
        width, height = picture.size
        if width < 1 or height < 1:
            raise DataError(
                f"{where} measures {width} x {height} pixels",
                kind="corrupt_image",
                source=source,
                field="image",
                remedy="replace it by a picture with at least one pixel",
            )
        if width * height > max_pixels:
            size = f"{width} x {height} = {width * height} pixels, the limit is {max_pixels}"
            raise _oversized(where, size, source)
        yield picture


def _bytes_of(content: Path | bytes, *, root: Path | None, source: str) -> io.BytesIO | Path:
    """What PIL can open: the path of an existing file, or bytes."""
    if isinstance(content, bytes):
        return io.BytesIO(content)
    reject_url(str(content), source=source, field="image")
    path = content if root is None else root / content
    try:
        if path.is_file():
            return path
        problem = "is not a file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be read
        problem = f"cannot be reached ({error})"
    raise DataError(
        f"the picture {str(path)!r} {problem}",
        kind="missing_image",
        source=source,
        field="image",
        remedy="check the path and the data set's root folder",
    )


def reject_url(path: str, *, source: str, field: str) -> None:
    """Refuse what is an address on a network instead of a file.

    Args:
        path: The path as written.
        source: Where it stands, named in the error.
        field: The field it was read from.

    Raises:
        DataError: Of kind ``unsupported_source``.
    """
    match = _URL.match(path)
    if match:
        raise DataError(
            f"{path!r} is an address ({match.group()[:-2]}), and only files can be read",
            kind="unsupported_source",
            source=source,
            field=field,
            remedy="download the files and give their folder",
        )


def _header(file: io.BytesIO | Path, *, where: str, source: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file, formats=_FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise DataError(
            f"{where} is no picture in a format that is read, or its beginning is damaged",
            kind="unsupported_image",
            source=source,
            field="image",
            remedy=f"use one of {', '.join(_FORMATS)}",
        ) from error
    except PIL.Image.DecompressionBombError as error:
        raise _oversized(where, str(error).rstrip("."), source) from error
    except _DECODING_ERRORS as error:
        raise _corrupt(where, error, source) from error


def _describe(ref: ImageRef, root: Path | None) -> str:
    if isinstance(ref.source, bytes):
        return f"the picture ({len(ref.source)} bytes)"
    if isinstance(ref.source, PIL.Image.Image):
        return f"the picture ({ref.source.width} x {ref.source.height}, {ref.source.mode})"
    return f"the picture {str(ref.source if root is None else root / ref.source)!r}"


def _oversized(where: str, size: str, source: str) -> DataError:
    return DataError(
        f"{where} is too large: {size}",
        kind="oversized_image",
        source=source,
        field="image",
        remedy="make it smaller, or raise max_pixels if it can be trusted",
    )


def _corrupt(where: str, error: BaseException, source: str) -> DataError:
    return DataError(
        f"{where} cannot be decoded ({type(error).__name__}: {error})",
        kind="corrupt_image",
        source=source,
        field="image",
        remedy="replace the file or remove the record",
    )


def jpeg_degrade(image: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    """Compress a picture as JPEG and open it again: the random degradation of training.

    Args:
        image: The picture.
        quality: JPEG quality, 1 to 100.

    Raises:
        DataError: Of kind ``oversized_image`` if a side is longer than JPEG can hold (65500).
    """
    if max(image.size) > 65500:
        raise DataError(
            f"the picture measures {image.width} x {image.height}, but JPEG holds 65500 a side",
            kind="oversized_image",
            field="image",
            remedy="make it smaller, or switch data_augment off for this data set",
        )
    with io.BytesIO() as file:
        image.convert("RGB").save(file, format="JPEG", quality=quality)
        with PIL.Image.open(file, formats=("JPEG",)) as degraded:
            return degraded.convert("RGB")


def draw_quality(generator: np.random.Generator) -> int:
    """Draw the JPEG quality of one picture, uniform in 75..100 with both ends.

    Args:
        generator: Source of randomness.
    """
    low, high = JPEG_QUALITIES
    return int(generator.integers(low, high, endpoint=True))
