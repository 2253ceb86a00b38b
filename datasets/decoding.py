"""From the bytes of an image file, whatever its mode, to a square rgb picture of the resolution asked for."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray as Array
from PIL import Image, ImageOps


class Unreadable(ValueError):
    """These bytes are no picture: empty, truncated, damaged, or another kind of file."""


def centre_square(width: int, height: int, crop: int | None) -> tuple[int, int, int]:
    """(left, top, side) in pixels of the centred square of side `crop`; None or too large: the shorter side."""
    side = min(width, height) if crop is None else min(width, height, crop)
    return round((width - side) / 2), round((height - side) / 2), side


def rgb(image: Image.Image, background: Sequence[float | int]) -> Image.Image:
    """8-bit rgb: 16-bit grey is scaled (not clipped), transparency shows `background` (rgb in [0, 1])."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        scale = 255.0 if image.mode == "F" else 255 / 65535
        return Image.fromarray(np.round(values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        behind = Image.new("RGBA", image.size, tuple(round(255 * channel) for channel in background))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def decode(
    data: bytes, *, resolution: int, crop: int | None, background: Sequence[float | int]
) -> UInt8[Array, "3 h w"]:
    """Upright as its EXIF says, composited, cropped to the centred square, resized by an antialiasing Lanczos filter.

    Raises: Unreadable, with the decoder's words.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            picture = rgb(ImageOps.exif_transpose(image), background)
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise almost anything, SyntaxError included
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    left, top, side = centre_square(*picture.size, crop)
    picture = picture.crop((left, top, left + side, top + side))
    if side != resolution:
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header. Raises Unreadable."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except Exception as error:  # as above
        raise Unreadable(f"{type(error).__name__}: {error}") from error
