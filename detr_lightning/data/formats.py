"""The formats of image files: opens them, and explains why one cannot be read."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from PIL import Image, UnidentifiedImageError, features

from detr_lightning.errors import UnreadableImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000")
"""The formats that are decoded, whatever a file's extension. Pillow supports more, but runs a program for EPS."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""The extensions of images in a folder without annotations, in upper or lower case."""

EXTENSIONS_IF_READABLE = {"AVIF": (".avif",), "HEIF": (".heic", ".heif")}
"""Further extensions of images, by format: they count only if the format is readable here; see `formats`."""

OTHER_EXTENSIONS = frozenset(
    (
        *(".avif", ".cr2", ".cr3", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf"),
        *(".pgm", ".ppm", ".psd", ".raf", ".rw2", ".svg", ".tga"),
    )
)
"""The extensions of images that are left out, with a warning."""

ImageFile: TypeAlias = "str | os.PathLike[str] | BinaryIO | Image.Image"
"""A path, an open file, or an image in memory."""

_QUIET = ((UserWarning, r"PIL\."), (DeprecationWarning, r"torchvision\.io\."))

_SIGNATURES = (
    (
        re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL),
        "HEIC",
        "Install support for it: pip install 'detr-lightning[heif]'",
    ),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF", "Install Pillow 11.3 or later, or save it as PNG"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL), "JPEG XL", "Save it as PNG"),
    (re.compile(rb"%PDF"), "PDF", "Save its pages as PNG"),
    (re.compile(rb"\s*<(\?xml|svg)"), "SVG or XML", "Save it as PNG"),
)
"""The first bytes of image-like files in none of `FORMATS`, with the format's name and advice."""


@functools.cache
def formats() -> tuple[str, ...]:
    """Return `FORMATS`, AVIF if Pillow reads it, and HEIF if pillow-heif is installed."""
    readable: tuple[str, ...] = FORMATS
    if features.check("avif"):
        readable += ("AVIF",)
    try:
        import pillow_heif
    except ImportError:
        return readable
    pillow_heif.register_heif_opener()
    return (*readable, "HEIF")


def image_extensions() -> tuple[str, ...]:
    """Return the extensions of images in a folder without annotations."""
    return (*EXTENSIONS, *(name for kind in formats() for name in EXTENSIONS_IF_READABLE.get(kind, ())))


@contextlib.contextmanager
def open_image(source: ImageFile, max_pixels: int | None = None) -> Iterator[Image.Image]:
    """Open an image file, and turn any error until it is closed, including those of decoding, into one kind.

    Args:
        source: The file; an image in memory is passed through.
        max_pixels: The number of pixels above which an image is refused as a decompression bomb. Sets Pillow's own
            limit for the whole process; None leaves it as it is.

    Raises:
        UnreadableImageError: The file is empty, broken or too large, or in none of `formats()`.
    """
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    _silence()
    try:
        if isinstance(source, Image.Image):
            opened: contextlib.AbstractContextManager[Image.Image] = contextlib.nullcontext(source)
        else:
            opened = Image.open(source, formats=formats())
        with opened as image:
            limit = Image.MAX_IMAGE_PIXELS  # Pillow itself only warns up to twice its limit
            if opened is image and limit is not None and image.width * image.height > limit:
                raise Image.DecompressionBombError
            yield image
    except MemoryError:
        raise
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{_name(source)}: {error.reason}", error.reason) from error
    except Exception as error:
        reason = _reason(error, source)
        raise UnreadableImageError(f"{_name(source)}: {reason}", reason) from error


def _name(source: ImageFile) -> str:
    return "image in memory" if isinstance(source, Image.Image) else str(getattr(source, "name", source))


def _reason(error: Exception, source: ImageFile) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels: refused as a decompression bomb (data.max_image_pixels)"
    start = _first_bytes(source)
    if start == b"":
        return "empty file (0 bytes)"
    if isinstance(error, UnidentifiedImageError):
        for signature, kind, advice in _SIGNATURES:
            if signature.match(start or b""):
                return f"{kind}, which is not supported here. {advice}"
        return "not an image, or its header is broken"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be decoded ({type(error).__name__}: {error})"


def _first_bytes(source: ImageFile) -> bytes | None:
    """Return the first bytes of a file, or None if they cannot be read."""
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                return file.read(32)
        if not isinstance(source, Image.Image):
            source.seek(0)
            return source.read(32)
    except (OSError, ValueError):
        pass
    return None


def _silence() -> None:
    """Silence Pillow's warnings about odd metadata, and torchvision's about the future of its decoders.

    `warnings.catch_warnings` is not thread-safe, and makes other libraries' warnings appear more than once.
    """
    for category, module in _QUIET:
        if ("ignore", None, category, re.compile(module), 0) not in warnings.filters:
            warnings.filterwarnings("ignore", category=category, module=module)


def read_content(source: str | os.PathLike[str] | BinaryIO) -> bytes:
    """Return the bytes of an image file, whether or not they are an image.

    Raises:
        UnreadableImageError: The bytes cannot be read.
    """
    try:
        return Path(source).read_bytes() if isinstance(source, str | os.PathLike) else source.read()
    except OSError as error:
        reason = _reason(error, source)
        raise UnreadableImageError(f"{_name(source)}: {reason}", reason) from error
