"""From tensors to pictures on disk: 8-bit images, grids, colours for depth and normals, PNG and MP4 files.

A batch of pictures is uint8 `[b 3 h w]`; one finished picture or video frame is uint8 `[h w 3]`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from gan3d.cameras import Number

NEUTRAL = 235  # the light grey behind depth and normals, where there is nothing to colour
# 17 equally spaced colours of magma (Smith and van der Walt, CC0), whose lightness rises evenly; linear in between
# it is within 2.5/255 of the original.
MAGMA = ("000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 "
         "fde2a3 fcfdbf")


def to_uint8(images: Float[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """[−1, 1] → 0 … 255 as evaluation does it: x·127.5 + 128, clamped and truncated."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def magma(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b 3"]:
    """The colour map at x in [0, 1] (clamped): black over violet to pale yellow, rgb in [0, 1]."""
    table = torch.tensor([list(bytes.fromhex(colour)) for colour in MAGMA.split()], dtype=x.dtype, device=x.device)
    place = x.clamp(0, 1) * (len(table) - 1)
    below = place.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], (place - below)[..., None]) / 255


def surface_depth(depth: Float[Tensor, "*b h w"], opacity: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
    """Distance of what a ray meets, given that it meets something: Σ weight·t / Σ weight."""
    return depth / opacity.clamp_min(1e-4)


def depth_range(
    depth: Float[Tensor, "*b h w"], opacity: Float[Tensor, "*b h w"], percentiles: tuple[Number, Number] = (2, 98)
) -> tuple[float, float]:
    """(near, far) between which the depths of the opaque pixels lie, up to outliers. One range for many pictures
    makes their colours comparable.

    Args:
        depth, opacity: as a rendering has them, depth not divided by opacity.
        percentiles: of the pixels more than half opaque (of all pixels, where none is).
    """
    solid = opacity > 0.5
    values = surface_depth(depth, opacity)[solid if bool(solid.any()) else torch.ones_like(solid)].float().sort().values
    near, far = (float(values[round((len(values) - 1) * p / 100)]) for p in percentiles)
    return near, max(far, near + 1e-6)


def colour_depth(
    depth: Float[Tensor, "*b h w"], opacity: Float[Tensor, "*b h w"], limits: tuple[Number, Number] | None = None
) -> UInt8[Tensor, "*b 3 h w"]:
    """Depth in colours, bright is near; it fades to neutral grey as the opacity goes to 0.

    Args:
        depth, opacity: as a rendering has them, depth not divided by opacity.
        limits: depths of the brightest and the darkest colour, scene units; None: the pictures' own `depth_range`.
    """
    near, far = limits or depth_range(depth, opacity)
    nearness = (far - surface_depth(depth, opacity)) / (far - near)
    return _over_neutral(magma(0.06 + 0.92 * nearness.clamp(0, 1)), opacity)


def colour_normals(
    normals: Float[Tensor, "*b h w 3"], opacity: Float[Tensor, "*b h w"]
) -> UInt8[Tensor, "*b 3 h w"]:
    """Unit normals in the camera's axes (x right, y down, z forward) as colours: red to the right, green up, blue
    towards the camera, the usual look of normal maps. Neutral grey where nothing is."""
    towards_viewer = normals * normals.new_tensor([1.0, -1.0, -1.0])
    return _over_neutral((towards_viewer + 1) / 2, opacity)


def grey(x: Float[Tensor, "*b h w"]) -> UInt8[Tensor, "*b 3 h w"]:
    """[0, 1] → black to white: opacities."""
    return to_uint8((2 * x - 1)[..., None, :, :].expand(*x.shape[:-2], 3, *x.shape[-2:]))


def _over_neutral(rgb: Tensor, opacity: Tensor) -> Tensor:
    alpha = opacity.clamp(0, 1)[..., None]
    return (rgb * 255 * alpha + NEUTRAL * (1 - alpha)).round().clamp(0, 255).to(torch.uint8).movedim(-1, -3)


def enlarge(pictures: UInt8[Tensor, "*b 3 h w"], factor: int) -> UInt8[Tensor, "*b 3 fh fw"]:
    """Every pixel becomes a square of `factor`² pixels."""
    return pictures.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def fit(pictures: UInt8[Tensor, "b 3 h w"], side: int) -> UInt8[Tensor, "b 3 s s2"]:
    """To height `side` by nearest pixels, keeping the aspect: raw depth beside an upsampled image."""
    height, width = pictures.shape[-2:]
    if height == side:
        return pictures
    rows = torch.arange(side, device=pictures.device) * height // side
    columns = torch.arange(round(width * side / height), device=pictures.device) * height // side
    return pictures[..., rows, :][..., columns.clamp(max=width - 1)]


def grid(
    pictures: UInt8[Tensor, "b 3 h w"], columns: int | None = None, pad: int = 2
) -> UInt8[Tensor, "height width 3"]:
    """One picture of many, row by row, with `pad` white pixels around each.

    Args:
        columns: None: as square as it gets.
    """
    n, _, height, width = pictures.shape
    columns = columns or max(1, round((n * height / width) ** 0.5))
    rows = -(-n // columns)
    sheet = pictures.new_full((3, rows * (height + pad) + pad, columns * (width + pad) + pad), 255)
    for i, picture in enumerate(pictures):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        sheet[:, top:top + height, left:left + width] = picture
    return sheet.permute(1, 2, 0).contiguous()


def labelled_grid(
    pictures: UInt8[Tensor, "b 3 h w"], columns: Sequence[str], rows: Sequence[str], minimum_side: int = 128
) -> UInt8[Tensor, "height width 3"]:
    """A table of pictures, row by row, with words above its columns and beside its rows.

    Args:
        minimum_side: smaller pictures are enlarged by a whole factor first, so that the words fit.
    Raises: ValueError if there are not rows × columns pictures.
    """
    from PIL import Image, ImageDraw, ImageFont

    if len(pictures) != len(columns) * len(rows):
        raise ValueError(f"{len(rows)} rows of {len(columns)} columns need as many pictures, got {len(pictures)}")
    pictures = enlarge(pictures, max(1, -(-minimum_side // min(pictures.shape[-2:]))))
    height, width = pictures.shape[-2] + 2, pictures.shape[-1] + 2  # with the space between
    font = ImageFont.load_default(size=max(14, height // 10))
    left = round(max(font.getlength(word) for word in rows)) + 12
    top = round(font.size * 1.6)
    table = grid(pictures, len(columns))
    sheet = Image.new("RGB", (left + table.shape[1], top + table.shape[0]), "white")
    sheet.paste(Image.fromarray(table.cpu().numpy()), (left, top))
    pen = ImageDraw.Draw(sheet)
    for i, word in enumerate(columns):
        pen.text((left + (i + 0.5) * width, top / 2), word, "black", font, "mm")
    for i, word in enumerate(rows):
        pen.text((left - 6, top + (i + 0.5) * height), word, "black", font, "rm")
    return torch.from_numpy(np.array(sheet))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all is written: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_png(path: str | Path, picture: UInt8[Tensor, "h w 3"], minimum_side: int = 0) -> Path:
    """A PNG; if its shorter side is below `minimum_side` it is enlarged by a whole factor, pixels staying squares."""
    from PIL import Image

    factor = max(1, -(-minimum_side // min(picture.shape[:2])))
    picture = enlarge(picture.permute(2, 0, 1), factor).permute(1, 2, 0)
    with replacing(path) as part:
        Image.fromarray(picture.cpu().numpy()).save(part)
    return Path(path)


def write_video(
    path: str | Path, frames: Iterable[UInt8[Tensor, "h w 3"]], fps: Number = 24, minimum_side: int = 384
) -> Path:
    """An MP4 (H.264, yuv420p: it plays everywhere), written frame by frame, so any number of frames fits in memory.

    Args:
        minimum_side: frames whose shorter side is below are enlarged by a whole factor, pixels staying sharp squares;
            0 keeps them as they are. An odd width or height is padded by one repeated row or column.
    Raises: ValueError if there are no frames or they differ in size.
    """
    import imageio.v3 as iio

    size = None
    with replacing(path) as part, iio.imopen(part, "w", plugin="pyav") as video:
        for frame in frames:
            if size is None:
                size = frame.shape
                factor = max(1, -(-minimum_side // min(size[:2])))
                video.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
            if frame.shape != size:
                raise ValueError(f"frames must have one size, got {tuple(size[:2])}, then {tuple(frame.shape[:2])}")
            picture = enlarge(frame.permute(2, 0, 1), factor).permute(1, 2, 0)
            picture = torch.cat([picture, picture[-1:]]) if len(picture) % 2 else picture
            picture = torch.cat([picture, picture[:, -1:]], 1) if picture.shape[1] % 2 else picture
            video.write_frame(picture.cpu().numpy())
        if size is None:
            raise ValueError(f"no frames to write to {path}")
    return Path(path)


def write_gif(path: str | Path, frames: Iterable[UInt8[Tensor, "h w 3"]], fps: Number = 24) -> Path:
    """An animated GIF, for viewers that show no MP4 (TensorBoard). Loops for ever."""
    from PIL import Image

    pictures = [Image.fromarray(frame.cpu().numpy()) for frame in frames]
    if not pictures:
        raise ValueError(f"no frames to write to {path}")
    with replacing(path) as part:
        pictures[0].save(part, format="GIF", save_all=True, append_images=pictures[1:], duration=1000 / fps, loop=0)
    return Path(path)
