"""An encoded picture, opened with care: its size as it is shown, its pixels, or the reason why there are none.

H, W: height and width in pixels, turned as the EXIF orientation says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from efficap.data.patience import TooSlowError, within
from efficap.picture_files import FORMATS, MAX_PIXELS, open_picture, orientation_of, read_picture_file, rgb_of

# How EXIF says it by the standard, as 16 bits; least and most significant byte first.
_ENTRIES = (b"\x12\x01\x03\x00\x01\x00\x00\x00", b"\x01\x12\x00\x03\x00\x00\x00\x01")
_REDUCTIONS = (8, 4, 2)


class PictureError(OSError):
    """A picture that cannot be read.

    Attributes:
        reason: a word or two to count by: ``missing``, ``too slow``, ``no access`` (what the disk or its rights say,
            and may not say tomorrow), ``empty``, ``no picture``, ``truncated``, ``too large``, ``too narrow`` or
            ``unreadable``.
        detail: more about it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Picture:
    """A picture whose header has been read.

    Args:
        source: a file, or its bytes.
        max_pixels: more than these, a decompression bomb perhaps, are refused before they are decoded.
        formats: Pillow's names of those that are tried.
        timeout: seconds that reading the file may take; None: any.

    Attributes:
        width, height: as shown, in pixels.
        format: Pillow's name of it, such as ``JPEG``.
        orientation: of EXIF, 1 (upright) to 8.
        plain: whether any decoder would turn it alike: it is upright, or its EXIF says what it is as the standard
            wants it. Pillow also turns by XMP and by entries of other types.

    Raises:
        PictureError: there is no such file, or no regular one, it is too slow, no picture, too large, or a PNG that is
            damaged.
    """

    def __init__(
        self,
        source: Path | bytes,
        max_pixels: int = MAX_PIXELS,
        formats: tuple[str, ...] = FORMATS,
        *,
        timeout: float | None = None,
    ) -> None:
        data = source if isinstance(source, bytes) else _read(source, max_pixels, timeout)
        if not data:
            raise PictureError("empty", "0 bytes")
        try:
            self._image = open_picture(data, max_pixels, formats)
        except Image.DecompressionBombError as error:
            raise PictureError("too large", str(error)) from error
        except UnidentifiedImageError:
            raise PictureError("no picture", f"begins with {data[:16]!r}") from None
        except Exception as error:  # of many kinds, by format and damage
            raise _classified(error) from error
        width, height = self._image.size
        self.format = self._image.format or ""
        if self.format == "PNG" and "exif" not in self._image.info:
            try:
                self._image.load()  # for EXIF at its end; `getexif` would do so too, and pass over any damage
            except Exception as error:
                raise _classified(error) from error
        self.orientation = orientation_of(self._image)
        self.plain = self.orientation == 1 or any(
            entry in self._image.info.get("exif", b"") for entry in _ENTRIES
        )
        self.width, self.height = (height, width) if self.orientation >= 5 else (width, height)

    def pixels(self, at_least: int | None = None) -> Tensor:
        """Decode to (3, H, W) uint8 RGB; the first frame of an animation, without its alpha.

        Args:
            at_least: a JPEG may come at 1/2, 1/4 or 1/8 of its size while its short side keeps as many pixels:
                its decoder does that in the frequency domain, several times faster.

        Raises:
            PictureError: the data are damaged or end too early.
        """
        try:
            if at_least is not None and self.format == "JPEG":
                self._reduce(at_least)
            pixels = torch.from_numpy(rgb_of(self._image)).permute(2, 0, 1)  # (3, H, W)
        except Exception as error:
            raise _classified(error) from error
        return _turned(pixels, self.orientation)

    def _reduce(self, at_least: int) -> None:
        width, height = self._image.size
        for factor in _REDUCTIONS:
            if min(width, height) // factor >= at_least:
                self._image.draft(self._image.mode, (width // factor, height // factor))
                return


def pixels_of(image: Image.Image) -> Tensor:
    """An opened picture's (3, H, W) uint8 RGB, the same as those of its file.

    Raises:
        PictureError: the data are damaged or end too early.
    """
    orientation = orientation_of(image)  # before decoding, which takes a TIFF's away
    try:
        return _turned(torch.from_numpy(rgb_of(image)).permute(2, 0, 1), orientation)  # (3, H, W)
    except Exception as error:
        raise _classified(error) from error


def _read(file: Path, max_pixels: int, timeout: float | None) -> bytes:
    try:
        return within(timeout, read_picture_file, file, max_pixels)
    except FileNotFoundError:
        raise PictureError("missing") from None
    except TooSlowError as error:
        raise PictureError("too slow", str(error)) from None
    except OSError as error:
        reason = "no access" if error.errno else "unreadable"  # not what `read_picture_file` itself refuses
        raise PictureError(reason, error.strerror or str(error)) from error
    except ValueError as error:  # of a name with a NUL, or that the file system's encoding lacks
        raise PictureError("unreadable", str(error)) from error


def _classified(error: Exception) -> PictureError:
    text = str(error) or type(error).__name__
    early = isinstance(error, EOFError) or any(word in text.lower() for word in ("truncated", "end of"))
    return PictureError("truncated" if early else "unreadable", " ".join(text.split()))


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """(3, H, W) as stored to (3, H, W) as shown; https://www.cipa.jp/std/documents/e/DC-X008-Translation-2019-E.pdf."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}.get(orientation)
    return pixels.flip(flips) if flips else pixels
