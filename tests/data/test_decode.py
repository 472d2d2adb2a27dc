"""Sizes and pixels against the official preprocessing; every mode; every broken file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from places import SHARED
from torchvision.transforms import functional as tv

from detr_lightning.data import formats
from detr_lightning.data.decode import BACKENDS, read_image, rgb
from detr_lightning.data.records import ImageRecord
from detr_lightning.data.sources import COCOImages
from detr_lightning.errors import UnreadableImageError
from detr_lightning.format.preprocessing import resized_size

COCO = SHARED / "coco"
needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="needs ../shared/coco beside the repository")


def official_size(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """The official arithmetic once more, step by step on the scale rather than on sides."""
    target = short_side
    elongation = float(max(width, height)) / float(min(width, height))
    if elongation * target > long_side:
        target = round(long_side * float(min(width, height)) / float(max(width, height)))
    if (height <= width and height == target) or (width <= height and width == target):
        return height, width
    if height <= width:
        return target, int(target * width / height)
    return int(target * height / width), target


class TestResizedSize:
    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((480, 640), (800, 1066)),
            ((640, 480), (1066, 800)),
            ((427, 640), (800, 1199)),
            ((500, 500), (800, 800)),
            ((200, 640), (417, 1334)),
            ((281, 500), (749, 1332)),
            ((500, 281), (1332, 749)),
            ((800, 1200), (800, 1200)),
            ((1, 1), (800, 800)),
        ],
    )
    def test_known(self, size: tuple[int, int], expected: tuple[int, int]) -> None:
        assert resized_size(size) == expected

    @settings(max_examples=1000, deadline=None)
    @given(
        size=st.tuples(*[st.integers(1, 1500) | st.integers(1, 2**31 - 1)] * 2),
        target=st.just((800, 1333)) | st.tuples(st.integers(1, 1500), st.integers(1, 2500)),
    )
    def test_official_arithmetic(self, size: tuple[int, int], target: tuple[int, int]) -> None:
        expected = official_size(*size, *target)
        if min(expected) < 1:
            with pytest.raises(ValueError, match=rf"{size[1]}x{size[0]} \(width x height\) is too thin"):
                resized_size(size, *target)
        else:
            assert resized_size(size, *target) == expected
            assert resized_size(size[::-1], *target) == expected[::-1]

    def test_a_grid_of_official_sizes(self) -> None:
        for height in range(100, 700, 7):
            for width in range(100, 700):
                assert resized_size((height, width)) == official_size(height, width, 800, 1333)


def photo(size: tuple[int, int] = (64, 48), mode: str = "RGB") -> Image.Image:
    """A picture of soft gradients and some noise; of a seed, so always the same."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x / 9 + phase) * np.cos(y / 7 - phase) for phase in (0.0, 1.0, 2.0)]
    values = np.stack(planes, -1) + np.random.default_rng(0).normal(0, 8, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert(mode)


def record_of(path: Path) -> ImageRecord:
    with Image.open(path) as image:
        return ImageRecord(1, path.name, image.width, image.height)


def read(path: Path, size: tuple[int, int] = (30, 40), backend: str = "pil") -> torch.Tensor:
    return read_image(path, record_of(path), size, backend)[0]


def array_of(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


def png_of_16_bit_colour(path: Path) -> None:
    """Pillow cannot write one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    values = (np.asarray(photo()).astype(">u2") * 257).reshape(48, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("backend", BACKENDS)
class TestReadPixels:
    @pytest.mark.parametrize("name", ["a.jpg", "a.png", "gray.jpg", "a.bmp"])
    def test_memory(self, tmp_path: Path, backend: str, name: str) -> None:
        photo(mode="L" if name == "gray.jpg" else "RGB").save(tmp_path / name)
        for size in ((30, 40), (96, 128), (48, 64)):
            pixels = read(tmp_path / name, size, backend)
            assert pixels.shape == (3, *size)
            assert pixels.dtype == torch.uint8
            assert pixels.permute(1, 2, 0).is_contiguous()
            pixels[0, 0, 0] = 7

    @pytest.mark.parametrize(
        ("mode", "extension"),
        [
            *(("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("L", "png"), ("LA", "png"), ("P", "png")),
            *(("RGBA", "png"), ("1", "png"), ("1", "tif"), ("CMYK", "tif"), ("RGBA", "webp")),
            *(("RGB", "bmp"), ("P", "bmp"), ("P", "gif"), ("RGB", "ppm")),
        ],
    )
    def test_modes(self, tmp_path: Path, backend: str, mode: str, extension: str) -> None:
        path = tmp_path / f"a.{extension}"
        photo(mode=mode).save(path)
        with Image.open(path) as image:
            expected = np.asarray(image.convert("RGB").resize((40, 30), Image.Resampling.BILINEAR))
        difference = np.abs(array_of(read(path, backend=backend)).astype(int) - expected)
        assert difference.max() <= (0 if backend == "pil" else 1)

    @pytest.mark.parametrize("transparency", [3, bytes(range(256))])
    def test_palette_with_transparency(self, tmp_path: Path, backend: str, transparency: int | bytes) -> None:
        path = tmp_path / "a.png"
        photo(mode="P").save(path, transparency=transparency)
        expected = photo(mode="P").convert("RGB").resize((40, 30), Image.Resampling.BILINEAR)
        assert (array_of(read(path, backend=backend)) == np.asarray(expected)).all()

    @pytest.mark.parametrize("kind", ["I;16 png", "I;16 tif", "F tif"])
    def test_more_than_8_bits(self, tmp_path: Path, backend: str, kind: str) -> None:
        gray = np.asarray(photo(mode="L"))
        wide = gray.astype(np.float32) / 255 if kind == "F tif" else gray.astype(np.uint16) * 257
        path = tmp_path / f"a.{kind.rpartition(' ')[2]}"
        Image.fromarray(wide).save(path)
        pixels = array_of(read(path, (48, 64), backend)).astype(int)
        assert (np.abs(pixels - gray[..., None]) <= (kind == "F tif")).all()

    @pytest.mark.parametrize("peak", [100, 4095, 65535])
    def test_the_scale_is_the_files_and_not_its_brightest_pixels(self, tmp_path: Path, backend: str, peak: int) -> None:
        values = np.array([[0, 64, peak]], np.uint16)
        Image.fromarray(values).save(tmp_path / "a.tif")
        assert read(tmp_path / "a.tif", (1, 3), backend)[0, 0].tolist() == [0, 0, peak >> 8]
        if peak == 4095:  # 12 bits in 16, said so
            Image.fromarray(values).save(tmp_path / "b.tif", tiffinfo={281: 4095})
            assert read(tmp_path / "b.tif", (1, 3), backend)[0, 0].tolist() == [0, 3, 255]

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.array([[0, 70_000]], np.int32), "32-bit"),
            (np.array([[-5, 100]], np.int32), "signed"),
            *(
                (np.array([[0.5, value]], np.float32), "floats outside of 0 to 1")
                for value in (np.nan, np.inf, -0.1, 255)
            ),
        ],
    )
    def test_what_has_no_scale_is_refused(self, tmp_path: Path, backend: str, values: np.ndarray, reason: str) -> None:
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(UnreadableImageError, match=rf"a\.tif: .*{reason}"):
            read(tmp_path / "a.tif", (1, 2), backend)

    def test_16_bit_colour(self, tmp_path: Path, backend: str) -> None:
        png_of_16_bit_colour(tmp_path / "a.png")
        assert (array_of(read(tmp_path / "a.png", (48, 64), backend)) == np.asarray(photo())).all()

    def test_lab(self, tmp_path: Path, backend: str) -> None:
        Image.new("LAB", (8, 6), (255, 128, 128)).save(tmp_path / "a.tif")
        assert read(tmp_path / "a.tif", (6, 8), backend).min() > 250

    def test_orientation_tags_are_ignored(self, tmp_path: Path, backend: str) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        photo().save(tmp_path / "turned.jpg", exif=exif)
        photo().save(tmp_path / "plain.jpg")
        assert read(tmp_path / "turned.jpg", backend=backend).equal(read(tmp_path / "plain.jpg", backend=backend))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
    def test_orientation_tags_are_applied_where_asked(
        self, tmp_path: Path, backend: str, orientation: int, extension: str
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{extension}"
        photo().save(path, exif=exif)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        record = ImageRecord(1, path.name, *upright.size)
        pixels, seen = read_image(path, record, upright.size[::-1], backend, exif="apply")
        assert np.abs(array_of(pixels).astype(int) - np.asarray(upright)).max() <= (backend == "torchvision")
        assert seen == (1 if extension == "tif" else orientation)  # Pillow itself turns a TIFF.
        if orientation >= 5 and extension != "tif":
            with pytest.raises(UnreadableImageError, match=r"its EXIF tag turns it \(data\.exif=apply\)"):
                read_image(path, record, upright.size[::-1], backend)

    @pytest.mark.parametrize("place", ["in XMP alone", "after XMP", "of another type"])
    def test_orientation_tags_are_found_wherever_they_are(self, tmp_path: Path, backend: str, place: str) -> None:
        xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
        kind, value = (4, 6) if place == "of another type" else (3, 6 << 16)  # a LONG, or the usual SHORT
        exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x0112, kind, 1, value, 0)
        segments = {
            "in XMP alone": [b"http://ns.adobe.com/xap/1.0/\0" + xmp],
            "after XMP": [b"http://ns.adobe.com/xap/1.0/\0" + xmp.replace(b"6", b"1"), exif],
            "of another type": [exif],
        }[place]
        photo().save(tmp_path / "plain.jpg", quality=95)
        plain = (tmp_path / "plain.jpg").read_bytes()
        headers = b"".join(b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment for segment in segments)
        (tmp_path / "turned.jpg").write_bytes(plain[:2] + headers + plain[2:])
        upright = Image.open(tmp_path / "plain.jpg").transpose(Image.Transpose.ROTATE_270)
        record = ImageRecord(1, "turned.jpg", *upright.size)
        pixels, orientation = read_image(tmp_path / "turned.jpg", record, (64, 48), backend, exif="apply")
        assert orientation == 6
        assert np.abs(array_of(pixels).astype(int) - np.asarray(upright)).max() <= 1

    def test_remarks_on_metadata_stay_quiet(self, tmp_path: Path, backend: str) -> None:
        photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\xff\x7f")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with Image.open(tmp_path / "a.jpg") as image:
                image.getexif().get_ifd(0x8769)
            assert seen
            seen.clear()
            read_image(tmp_path / "a.jpg", ImageRecord(1, "a.jpg", 64, 48), (30, 40), backend)
            assert not seen

    @pytest.mark.parametrize("size", [(48, 64), (65, 48), (64, 49)])
    def test_another_size_than_stated(self, tmp_path: Path, backend: str, size: tuple[int, int]) -> None:
        photo().save(tmp_path / "a.jpg")
        message = rf"a\.jpg: the file is 64x48 \(width x height\), but {size[0]}x{size[1]} was expected"
        with pytest.raises(UnreadableImageError, match=message):
            read_image(tmp_path / "a.jpg", ImageRecord(1, "a.jpg", *size), (30, 40), backend)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", r"empty file \(0 bytes\)"),
            (b"hello", "not an image"),
            (b"\xff\xd8\xff\xe0\0\x10JFIF", "."),
            (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "."),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n", "not an image"),
        ],
    )
    def test_no_image(self, tmp_path: Path, backend: str, content: bytes, reason: str) -> None:
        (tmp_path / "a.jpg").write_bytes(content)
        with pytest.raises(UnreadableImageError, match=rf"a\.jpg: {reason}") as error:
            read_image(tmp_path / "a.jpg", ImageRecord(1, "a.jpg", 64, 48), (30, 40), backend)
        assert "a.jpg" not in error.value.reason

    @pytest.mark.parametrize(
        ("begin", "name"),
        [
            (b"\xff\x0a", "JPEG XL"),
            (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
            (b"%PDF-1.7", "PDF"),
            (b"<svg xmlns=''>", "SVG"),
        ],
    )
    def test_what_is_recognised_is_named(self, tmp_path: Path, backend: str, begin: bytes, name: str) -> None:
        (tmp_path / "a.jpg").write_bytes(begin + bytes(64))
        with pytest.raises(UnreadableImageError, match=rf"a\.jpg: {name}.*, which is not supported here"):
            read_image(tmp_path / "a.jpg", ImageRecord(1, "a.jpg", 64, 48), (30, 40), backend)

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow does not read AVIF")
    def test_avif(self, tmp_path: Path, backend: str) -> None:
        photo().save(tmp_path / "a.avif", quality=100)
        difference = array_of(read(tmp_path / "a.avif", (48, 64), backend)).astype(int) - np.asarray(photo())
        assert np.abs(difference).mean() < 5

    def test_heic(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
        heif.from_pillow(photo()).save(tmp_path / "a.heic", quality=95)
        difference = array_of(read(tmp_path / "a.heic", (48, 64), backend)).astype(int) - np.asarray(photo())
        assert np.abs(difference).mean() < 10
        monkeypatch.setattr(formats, "formats", lambda: formats.FORMATS)
        with pytest.raises(UnreadableImageError, match=r"HEIC, which is not supported here.*detr-lightning\[heif\]"):
            read_image(tmp_path / "a.heic", ImageRecord(1, "a.heic", 64, 48), (30, 40), backend)

    def test_folder_instead_of_a_file(self, tmp_path: Path, backend: str) -> None:
        with pytest.raises(UnreadableImageError, match="cannot be read"):
            read_image(tmp_path, ImageRecord(1, "a.jpg", 64, 48), (30, 40), backend)

    @pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "tif", "webp", "gif"])
    @pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
    def test_truncated(self, tmp_path: Path, backend: str, extension: str, share: float) -> None:
        whole = io.BytesIO()
        Image.effect_noise((64, 48), 80).convert("RGB").save(
            whole, {"jpg": "jpeg", "tif": "tiff"}.get(extension, extension)
        )
        path = tmp_path / f"a.{extension}"
        path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
        with pytest.raises(UnreadableImageError, match=rf"a\.{extension}: "):
            read_image(path, ImageRecord(1, path.name, 64, 48), (30, 40), backend)

    @pytest.mark.parametrize(("limit", "refused"), [(64 * 48, False), (64 * 48 - 1, True), (1000, True)])
    def test_decompression_bombs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, limit: int, refused: bool
    ) -> None:
        photo().save(tmp_path / "a.jpg")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        record = ImageRecord(1, "a.jpg", 64, 48)
        if refused:
            with pytest.raises(UnreadableImageError, match=rf"more than {limit} pixels.*data\.max_image_pixels"):
                read_image(tmp_path / "a.jpg", record, (30, 40), backend)
        assert read_image(tmp_path / "a.jpg", record, (30, 40), backend, max_pixels=5000)[0].shape == (3, 30, 40)

    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_damage_is_seen_or_harmless(
        self, tmp_path_factory: pytest.TempPathFactory, backend: str, data: st.DataObject
    ) -> None:
        extension = data.draw(st.sampled_from(["jpeg", "png", "bmp", "tiff", "webp", "gif"]))
        whole = io.BytesIO()
        photo((16, 12)).save(whole, extension)
        content = bytearray(whole.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.mktemp("damaged") / "a"
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
        try:
            assert read_image(path, ImageRecord(1, "a", 16, 12), (9, 12), backend)[0].shape == (3, 9, 12)
        except UnreadableImageError as error:
            assert error.reason  # noqa: PT017


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I;16", "F"]
)
def test_rgb_takes_every_mode(mode: str) -> None:
    if mode in ("I;16", "F"):
        image = rgb(Image.new(mode, (8, 600), 1 if mode == "F" else 2**16 - 1))
    else:
        image = rgb(Image.new("L", (8, 6), 255).convert("RGB").convert("P" if mode == "PA" else mode).convert(mode))
    assert image.mode == "RGB"
    assert np.asarray(image).min() == 255


def test_unknown_backend(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"data\.image_backend is 'pill'.*Did you mean 'pil'"):
        read(tmp_path / "a.jpg", backend="pill")


@pytest.fixture(scope="module")
def records() -> list[ImageRecord]:
    return COCOImages(COCO / "val2017", COCO / "annotations/instances_val2017.json").find()


@needs_coco
class TestCocoPixels:
    def test_pil_is_official_bit_for_bit(self, records: list[ImageRecord]) -> None:
        for record in records:
            with Image.open(COCO / "val2017" / record.file_name) as image:
                official = tv.resize(image.convert("RGB"), official_size(image.height, image.width, 800, 1333))
            pixels = read_image(COCO / "val2017" / record.file_name, record, resized_size(record.size))[0]
            assert (array_of(pixels) == np.asarray(official)).all(), record

    def test_torchvision_is_within_a_level(self, records: list[ImageRecord]) -> None:
        for record in records:
            path, size = COCO / "val2017" / record.file_name, resized_size(record.size)
            difference = (
                read_image(path, record, size)[0].int() - read_image(path, record, size, "torchvision")[0].int()
            )
            assert difference.abs().max() <= 1, record

    @pytest.mark.skipif(not (SHARED / "golden").is_dir(), reason="needs ../shared/golden beside the repository")
    def test_golden_corners(self, records: list[ImageRecord]) -> None:
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        golden = torch.load(SHARED / "golden" / "expected.pt")["single"]
        for name, expected in golden.items():
            record = next(record for record in records if record.file_name == name)
            size = resized_size(record.size)
            assert list(size) == list(expected["input_size"])
            pixels = read_image(COCO / "val2017" / record.file_name, record, size)[0]
            normalised = (pixels.contiguous().float() / 255 - mean) / std
            assert normalised[:, :48, :48].equal(expected["pixels_corner"])
            torch.testing.assert_close(normalised.mean((1, 2)), expected["pixels_mean"], rtol=1e-5, atol=1e-6)
