"""Both data modules see the same pixels: Pillow's way from files, DALI's from shards, and an independent reference.

S: image_size.
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tars import encoded, indexed, png16, sample, samples, scenery, shard_batches, write_tar
from toys import InTurn

from efficap.data.order import BatchOrder, EvaluationOrder
from efficap.data.pictures import Picture
from efficap.data.shards.reader import ShardReader
from efficap.data.transforms import Crop, EvaluationTransform, TrainingTransform

S = 48
SUFFIXES = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
LANDSCAPE, PORTRAIT = (133, 97), (91, 140)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def big_endian_exif(orientation: int, as_long: bool = False) -> bytes:
    """The EXIF of a camera that writes most significant bytes first, and perhaps the orientation as 32 bits."""
    value = struct.pack(
        ">HHII" if as_long else ">HHIHH", 0x0112, 4 if as_long else 3, 1, orientation, *[0][as_long:]
    )
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + value + bytes(4)


def with_exif_last(png: bytes) -> bytes:
    """The same PNG with its EXIF behind its pixels, where some programs add it."""
    start = png.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


def pictures_of(width: int, height: int) -> dict[str, bytes]:
    """The same scenery in every form that it may come in."""
    pixels = scenery(width, height)
    rgb = Image.fromarray(pixels)
    grey, cmyk = rgb.convert("L"), rgb.convert("CMYK")
    alpha = rgb.copy()
    alpha.putalpha(grey)
    deep = pixels.astype(np.uint16) * 257
    deep_grey = np.asarray(grey).astype(np.uint16) * 256 + 77
    palette = rgb.quantize(64)
    forms = {
        "jpeg 4:2:0": encoded(rgb, quality=85, subsampling="4:2:0"),
        "jpeg 4:2:2": encoded(rgb, quality=85, subsampling="4:2:2"),
        "jpeg 4:4:4": encoded(rgb, quality=95, subsampling="4:4:4"),
        "jpeg progressive": encoded(rgb, progressive=True),
        "jpeg grey": encoded(grey),
        "jpeg cmyk": encoded(cmyk, quality=90),
        "jpeg rgb": encoded(rgb, keep_rgb=True),
        "jpeg xmp": encoded(rgb, xmp=XMP),
        "jpeg MM": encoded(rgb, exif=big_endian_exif(6)),
        "jpeg long": encoded(rgb, exif=big_endian_exif(6, as_long=True)),
        "jpeg strange": encoded(rgb, exif=exif(11)),
        "jpeg not exif": encoded(rgb, exif=b"Exif\0\0damaged"),
        "mpo": encoded(rgb, "MPO", save_all=True, append_images=[grey.convert("RGB")]),
        "png rgb": encoded(rgb, "PNG"),
        "png grey": encoded(grey, "PNG"),
        "png palette": encoded(palette, "PNG"),
        "png transparent": encoded(palette, "PNG", transparency=3),
        "png 1 bit": encoded(grey.convert("1"), "PNG"),
        "png alpha": encoded(alpha, "PNG"),
        "png grey alpha": encoded(alpha.convert("LA"), "PNG"),
        "png 16 grey": encoded(Image.fromarray(deep_grey), "PNG"),
        "png 16 rgb": png16(deep + np.uint16(90)),
        "png 6": encoded(rgb, "PNG", exif=exif(6)),
        "png 6 last": with_exif_last(encoded(rgb, "PNG", exif=exif(6))),
        "webp": encoded(rgb, "WEBP", quality=90),
        "webp lossless": encoded(rgb, "WEBP", lossless=True),
        "webp alpha": encoded(alpha, "WEBP", lossless=True),
        "webp 6": encoded(rgb, "WEBP", exif=exif(6)),
        "bmp": encoded(rgb, "BMP"),
        "gif": encoded(rgb, "GIF"),
        "gif animated": encoded(palette, "GIF", save_all=True, append_images=[grey]),
        "tiff": encoded(rgb, "TIFF"),
        "tiff 16 grey": encoded(Image.fromarray(deep_grey), "TIFF"),
    }
    forms |= {f"jpeg {turned}": encoded(rgb, exif=exif(turned), quality=90) for turned in range(1, 9)}
    return forms | {f"tiff {turned}": encoded(rgb, "TIFF", exif=exif(turned)) for turned in range(2, 9)}


PICTURES = {
    f"{name}, {'landscape' if size is LANDSCAPE else 'portrait'}": data
    for size in (LANDSCAPE, PORTRAIT)
    for name, data in pictures_of(*size).items()
} | {
    "small": encoded(Image.fromarray(scenery(40, 31))),
    "one pixel": encoded(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
    "thin": encoded(Image.fromarray(scenery(9, 300)), "PNG"),
}
RULES = list(itertools.product(("bicubic", "bilinear"), (0.875, 1.0)))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """All pictures in one tar, each with its name as its caption."""
    members = []
    for number, (name, data) in enumerate(PICTURES.items()):
        kind = Image.open(io.BytesIO(data)).format or ""
        members += [(f"{number:04}.{SUFFIXES[kind]}", data), (f"{number:04}.txt", name.encode())]
    reader = indexed(write_tar(tmp_path_factory.mktemp("pictures") / "all.tar", members))
    assert len(reader) == len(PICTURES)
    return reader


@pytest.fixture(scope="module")
def from_shards(reader: ShardReader) -> Callable[[str, float], dict[str, NDArray[np.int64]]]:
    """What evaluation on shards sees of each picture, (S, S, 3); computed once a rule."""
    known: dict[tuple[str, float], dict[str, NDArray[np.int64]]] = {}

    def squares(interpolation: str, crop_pct: float) -> dict[str, NDArray[np.int64]]:
        if (interpolation, crop_pct) not in known:
            transform = EvaluationTransform(image_size=S, interpolation=interpolation, crop_pct=crop_pct)
            order = EvaluationOrder(len(reader), batch_size=64, rank=0, world=1)
            seen = {}
            for batch, bad in shard_batches(reader, order, transform):
                assert batch is not None
                assert not bad
                assert batch.references is not None
                for pixels, references in zip(batch.images, batch.references, strict=True):
                    seen[references[0]] = channels_last(pixels)
            known[interpolation, crop_pct] = seen
        return known[interpolation, crop_pct]

    return squares


def channels_last(pixels: torch.Tensor) -> NDArray[np.int64]:
    return pixels.permute(1, 2, 0).numpy().astype(np.int64)


def shown(data: bytes) -> Image.Image:
    """A picture as a viewer shows it, by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        scaled = np.rint(np.asarray(upright).astype(float) / 257)
        upright = Image.fromarray(scaled.astype(np.uint8))
    return upright.convert("RGB")


def centre(image: Image.Image, interpolation: str, crop_pct: float) -> NDArray[np.int64]:
    """The encoder's rule, by Pillow alone: short side to S / crop_pct, centre of S x S."""
    short = round(S / crop_pct)
    scale = min(image.size)
    width, height = (int(short * side / scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling[interpolation.upper()])
    left, top = round((width - S) / 2), round((height - S) / 2)
    return np.asarray(resized.crop((left, top, left + S, top + S))).astype(np.int64)


def far_apart(one: NDArray[np.int64], other: NDArray[np.int64], border: int) -> str:
    """What is wrong, if anything: more than 2 grey levels off the picture's edge, or 0.5 in the mean.

    At the edge DALI repeats the last pixel under its filter, where Pillow and torchvision leave it out.
    """
    assert one.shape == other.shape == (S, S, 3)
    difference = np.abs(one - other)
    inner, mean = difference[border : S - border, border : S - border].max(), difference.mean()
    return f"at most {inner}, {mean:.3f} in the mean" if inner > 2 or mean >= 0.5 else ""


@pytest.mark.parametrize(("interpolation", "crop_pct"), RULES)
def test_evaluation_sees_the_same_pixels_from_files_from_shards_and_by_the_reference(
    interpolation: str, crop_pct: float, from_shards: Callable[[str, float], dict[str, NDArray[np.int64]]]
) -> None:
    transform = EvaluationTransform(image_size=S, interpolation=interpolation, crop_pct=crop_pct)
    shards = from_shards(interpolation, crop_pct)
    assert shards.keys() == PICTURES.keys()
    far = []
    for name, data in PICTURES.items():
        files = channels_last(transform(Picture(data)))
        reference = centre(shown(data), interpolation, crop_pct)
        border = (
            11 if name == "thin" else 2
        )  # pixels; as wide as the filter is, which grows as a picture is enlarged
        for pair, one, other, at_edge in (
            ("files, shards", files, shards[name], border),
            ("shards, reference", shards[name], reference, border),
            ("files, reference", files, reference, 0),
        ):
            far += [f"{name}: {pair}: {why}" for why in [far_apart(one, other, at_edge)] if why]
    assert not far, "\n".join(far)


def test_shards_leave_out_what_is_too_narrow_and_the_others_keep_their_pixels(tmp_path: Path) -> None:
    narrow = encoded(Image.new("RGB", (4000, 1)), "PNG")
    reader = indexed(
        write_tar(tmp_path / "t.tar", [*samples("0"), *sample("1", "narrow", narrow), *samples("2")])
    )
    transform = EvaluationTransform(image_size=S, interpolation="bicubic", crop_pct=1.0)
    order = EvaluationOrder(len(reader), batch_size=64, rank=0, world=1)
    ((batch, bad),) = shard_batches(reader, order, transform)
    assert bad == [(f"{tmp_path}/t.tar: 1", "too narrow", "4000 x 1 pixels, the limit is 64 to 1")]
    assert batch is not None
    assert batch.image_ids == ["t/0", "t/2"]
    for square, number in zip(batch.images, (0, 2), strict=True):
        assert torch.equal(square, transform(Picture(reader.read(number).image)))


def test_pictures_that_break_a_decoders_habits_have_pillows_pixels() -> None:
    """Every form, at its full size, as Pillow alone shows it."""
    for name, data in PICTURES.items():
        picture = Picture(data)
        expected = np.asarray(shown(data)).astype(np.int64)
        assert (picture.height, picture.width) == expected.shape[:2], name
        assert np.abs(channels_last(picture.pixels()) - expected).max() <= 1, name


def training_transform(
    kind: type[TrainingTransform] = TrainingTransform, **changes: Any
) -> TrainingTransform:
    settings = {
        "image_size": S,
        "interpolation": "bicubic",
        "crop_scale": (0.3, 1.0),
        "crop_ratio": (0.8, 1.25),
    }
    return kind(**{**settings, "flip": True, "scaled_decoding": False, **changes})


def crop_of(data: bytes, transform: TrainingTransform, rng: np.random.Generator) -> NDArray[np.int64]:
    """A training crop by Pillow alone, (S, S, 3): cut, then resized, then mirrored."""
    whole = shown(data)
    crop = transform.cut(*whole.size, rng)
    part = whole.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    filter = Image.Resampling[transform.interpolation.name]
    square = np.asarray(part.resize((S, S), filter)).astype(np.int64)
    return square[:, ::-1] if crop.flip else square


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_training_crop_is_the_same_from_files_from_shards_and_by_the_reference(
    interpolation: str, reader: ShardReader
) -> None:
    """Bilinear within 2 grey levels; bicubic within 10, as DALI does not round and clip between its two passes."""
    transform = training_transform(interpolation=interpolation)
    order = BatchOrder(InTurn(len(reader)), batch_size=64, rank=0, world=1)
    squares = [
        pixels
        for batch, _ in shard_batches(reader, order, transform)
        if batch is not None
        for pixels in batch.images
    ]
    flips = 0
    for number, ((name, data), square) in enumerate(zip(PICTURES.items(), squares, strict=True)):
        files = channels_last(transform(Picture(data), np.random.default_rng((0, 0, number))))
        reference = crop_of(data, transform, np.random.default_rng((0, 0, number)))
        assert np.abs(files - reference).max() <= 4, name
        difference = np.abs(files - channels_last(square))
        if "1 bit" in name or name == "thin":  # nothing but edges from black to white, or enlarged fivefold
            assert difference.mean() < (1 if interpolation == "bilinear" else 5), name
        else:
            assert difference[2:-2, 2:-2].max() <= (2 if interpolation == "bilinear" else 10), name
            assert difference.mean() < 0.5, name
        flips += not np.array_equal(reference, crop_of(data, training_transform(flip=False),
                                                       np.random.default_rng((0, 0, number))))  # fmt: skip
    assert 0 < flips < len(PICTURES)


class Aligned(TrainingTransform):
    """Cuts at multiples of 8 pixels: elsewhere, a scaled picture is cut up to half of its own pixels beside."""

    def cut(self, width: int, height: int, rng: np.random.Generator) -> Crop:
        crop = super().cut(width, height, rng)
        left, top = crop.left // 8 * 8, crop.top // 8 * 8
        return Crop(left, top, crop.width // 8 * 8, crop.height // 8 * 8, crop.flip)


def crops(data: bytes, transform: TrainingTransform) -> NDArray[np.int64]:
    """Some training crops of a picture, (4, S, S, 3)."""
    rngs = map(np.random.default_rng, range(4))
    return np.stack([channels_last(transform(Picture(data), rng)) for rng in rngs])


@pytest.mark.parametrize("factor", [2.0, 3.1, 4.4, 9.0])
def test_scaled_decoding_is_nearly_the_same_picture(factor: float) -> None:
    side = round(factor * S)
    large = Image.fromarray(scenery(100, 80)).resize((side * 5 // 4, side), Image.Resampling.BICUBIC)
    whole, scaled = (
        crops(
            encoded(large, quality=90), training_transform(Aligned, crop_scale=(0.6, 1.0), scaled_decoding=on)
        )
        for on in (False, True)
    )
    assert not np.array_equal(whole, scaled), "it is decoded at a part of its size"
    assert np.abs(whole - scaled).mean() < 2


def test_scaled_decoding_cuts_at_most_half_of_its_pixels_beside() -> None:
    """Seen on a slope, whose grey tells the place."""
    slope = np.tile(np.linspace(0, 255, 8 * S)[None, :, None], (8 * S, 1, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(slope), quality=95)
    whole, scaled = (crops(data, training_transform(scaled_decoding=on)) for on in (False, True))
    assert np.abs(whole - scaled).max() <= 8 / 2 * 255 / (8 * S) + 2


def test_without_scaled_decoding_every_picture_is_decoded_whole() -> None:
    data = encoded(Image.fromarray(scenery(8 * S, 8 * S)), quality=90)
    for seed, square in enumerate(crops(data, training_transform())):
        reference = crop_of(data, training_transform(), np.random.default_rng(seed))
        assert np.abs(square - reference).max() <= 1


def test_only_jpegs_that_stay_large_enough_are_decoded_scaled() -> None:
    pixels = Image.fromarray(scenery(4 * S, 4 * S))
    for data in (encoded(pixels, "PNG"), encoded(pixels.resize((2 * S - 1, 3 * S)))):
        whole, scaled = (crops(data, training_transform(scaled_decoding=on)) for on in (False, True))
        assert np.array_equal(whole, scaled)


def test_scaled_decoding_keeps_real_photographs(shared: Callable[[str], Path]) -> None:
    files = sorted((shared("flickr8k") / "images").glob("*.jpg"))[:12]
    apart = []
    for file in files:
        with Image.open(file) as photograph:
            data = encoded(photograph.resize((500, 500), Image.Resampling.BICUBIC), quality=90)
        whole, scaled = (
            crops(data, training_transform(Aligned, crop_scale=(0.6, 1.0), image_size=96, scaled_decoding=on))
            for on in (False, True)
        )
        apart.append(np.abs(whole - scaled).mean())
    assert min(apart) > 0
    assert max(apart) < 3, "a lawn, say"
    assert np.mean(apart) < 2
