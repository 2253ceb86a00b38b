"""Trilinear interpolation in sparse voxel grids, with or without spherical harmonics, and which voxels are seen."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gan3d.ops import extension
from gan3d.ops.autograd import differentiable, shaped_like
from gan3d.ops.cells import Voxels
from gan3d.ops.reference import sparse_grid as reference


def sparse_sample(voxels: Voxels, values: Float[Tensor, "rows c"], coordinates: Float[Tensor, "*b 3"]
                  ) -> Float[Tensor, "*b c"]:
    """Trilinear interpolation between the eight voxels around each point; voxels that do not exist count as 0.

    Differentiable in values and coordinates; a gradient nobody asked for is not computed. On CUDA the gradient of
    values is a sum in no fixed order.

    Args:
        values: a row for each existing voxel, in the order of cells (their number is checked by the CPU's op only).
            Half precision is converted, the whole table.
        coordinates: in voxels, integers at voxel centres; clamped to [0, side − 1] along each axis, where the
            derivative beyond is 0. On a plane of voxels the derivative is that of the side above (last plane: below).
    Raises: ValueError if the sizes do not fit; TypeError for tensors that are not floating-point.
    """
    values, flat = extension.as_float(values), extension.as_float(coordinates).reshape(-1, 3)
    arguments = (voxels.words, voxels.rank, list(voxels.resolution), values.contiguous(), flat.contiguous())
    out = torch.ops.gan3d.sparse_sample(*arguments) if extension.native(values) else reference.sparse_sample(*arguments)
    return out.reshape(*coordinates.shape[:-1], values.shape[1])


def sparse_sample_sh(voxels: Voxels, values: Float[Tensor, "rows c"], coordinates: Float[Tensor, "*b 3"],
                     basis: Float[Tensor, "m k"], ray_index: Int32[Tensor, " n"] | None = None
                     ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b 3"]]:
    """Raw density and raw colour of points seen along rays, the interpolated coefficients never stored.

    c = 1 + 3k channels: raw density, then the k coefficients of red, of green and of blue. All are interpolated as by
    `sparse_sample`; a colour is the dot product of its coefficients with the basis of the point's ray. Plenoxels
    (2022), sec. 3.1. Activations are the caller's. Differentiable in values, coordinates and basis; on CUDA the
    gradients of values and basis are sums in no fixed order.

    Args:
        values, coordinates: see `sparse_sample`.
        basis: `sh(directions, degree)`; k = 1, 4, 9 or 16.
        ray_index: row of `basis` of each point, 0 to m − 1 (checked on the CPU only), in the order of the flattened
            points; sorted or not. None: point i has row i.
    Returns: raw density, and raw rgb without the 0.5 that Plenoxels adds.
    Raises: ValueError if the sizes do not fit, IndexError for a ray_index out of range; TypeError for tensors that are
        not floating-point.
    """
    values, flat = extension.as_float(values), extension.as_float(coordinates).reshape(-1, 3)
    if basis.shape[1] not in (1, 4, 9, 16) or values.shape[1] != 1 + 3 * basis.shape[1]:
        raise ValueError(f"sparse_sample_sh: values must have 1 + 3k channels and basis k = 1, 4, 9 or 16 terms, got "
                         f"{values.shape[1]} and {basis.shape[1]}")
    if len(flat) != (basis if ray_index is None else ray_index).shape[0]:
        raise ValueError(f"sparse_sample_sh: {len(flat)} points need as many entries of ray_index, or rows of basis")
    arguments = (voxels.words, voxels.rank, list(voxels.resolution), values.contiguous(), flat.contiguous(),
                 extension.as_float(basis).contiguous(), None if ray_index is None else ray_index.contiguous())
    density, rgb = (torch.ops.gan3d.sparse_sample_sh(*arguments) if extension.native(values)
                    else reference.sparse_sample_sh(*arguments))
    return density.reshape(coordinates.shape[:-1]), rgb.reshape(coordinates.shape)


def visibility(voxels: Voxels, density: Float[Tensor, " rows"], rays_o: Float[Tensor, "r 3"],
               rays_d: Float[Tensor, "r 3"], aabb: Float[Tensor, "2 3"], step: float = 0.5, stop: float = 0.0
               ) -> Float[Tensor, " rows"]:
    """The largest weight that any ray gives each voxel: what Plenoxels prunes by. Not differentiable.

    A ray is sampled every `step` voxels from where it enters the grid, half a voxel beyond the outermost centres (or
    from its origin, if that is inside). A sample's density is interpolated, then clamped to be ≥ 0, and its weight is
    transmittance × (1 − e^(−density·length of the step)). All existing voxels of its eight get this weight, not
    multiplied by their shares, as in Plenoxels' released code; samples of density 0 give none. Empty space is left out
    without moving the samples.

    Args:
        density: raw, per scene unit; negative allowed.
        rays_o, rays_d: scene units; directions need not be unit length, zero ones see nothing.
        aabb: min and max corner of the grid: voxel (x, y, z) is centred at min + (x + ½, …)·(max − min)/resolution.
        step: in voxels along the ray, at least 1/1024.
        stop: a ray ends after the sample that takes its transmittance below this. Plenoxels: 0.2, by mistake.
    Returns: in [0, 1]; 0 for voxels never seen. Of several calls (one a camera), take the maximum.
    Raises: ValueError if the sizes do not fit or the step is too small; TypeError for tensors that are not
        floating-point.
    """
    if not step >= 1 / 1024:
        raise ValueError(f"visibility: step must be at least 1/1024 voxel, got {step}")
    raw, o, d, box = (extension.as_float(x.detach()).contiguous() for x in (density, rays_o, rays_d, aabb))
    arguments = (voxels.words, voxels.rank, list(voxels.resolution), raw, o, d, box, step, stop)
    return torch.ops.gan3d.visibility(*arguments) if extension.native(raw) else reference.visibility(*arguments)


@extension.after_loading
def _register() -> None:
    @torch.library.register_fake("gan3d::sparse_sample")
    def _(words: Tensor, rank: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor) -> Tensor:
        return values.new_empty(coordinates.shape[0], values.shape[1])

    @torch.library.register_fake("gan3d::sparse_sample_backward")
    def _(grad: Tensor, words: Tensor, rank: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor,
          needed: list[bool]) -> tuple[Tensor, ...]:
        return shaped_like([values, coordinates], needed)

    @torch.library.register_fake("gan3d::sparse_sample_sh")
    def _(words: Tensor, rank: Tensor, resolution: list[int], values: Tensor, coordinates: Tensor, basis: Tensor,
          ray_index: Tensor | None) -> tuple[Tensor, Tensor]:
        n = coordinates.shape[0]
        return values.new_empty(n), values.new_empty(n, 3)

    @torch.library.register_fake("gan3d::sparse_sample_sh_backward")
    def _(grad_density: Tensor, grad_rgb: Tensor, words: Tensor, rank: Tensor, resolution: list[int], values: Tensor,
          coordinates: Tensor, basis: Tensor, ray_index: Tensor | None, needed: list[bool]) -> tuple[Tensor, ...]:
        return shaped_like([values, coordinates, basis], needed)

    @torch.library.register_fake("gan3d::visibility")
    def _(words: Tensor, rank: Tensor, resolution: list[int], density: Tensor, *_: object) -> Tensor:
        return torch.empty_like(density)

    @register_flop_formula(torch.ops.gan3d.sparse_sample)
    def _(words: tuple, rank: tuple, resolution: list[int], values: tuple, coordinates: tuple, *,
          out_shape: tuple, **_: object) -> int:
        return 16 * coordinates[0] * values[1]  # eight multiply-adds a channel

    @register_flop_formula(torch.ops.gan3d.sparse_sample_backward)
    def _(grad: tuple, words: tuple, rank: tuple, resolution: list[int], values: tuple, coordinates: tuple,
          needed: list[bool], *, out_shape: tuple, **_: object) -> int:
        return 16 * sum(needed) * coordinates[0] * values[1]

    @register_flop_formula(torch.ops.gan3d.sparse_sample_sh)
    def _(words: tuple, rank: tuple, resolution: list[int], values: tuple, coordinates: tuple, basis: tuple,
          ray_index: tuple | None, *, out_shape: tuple, **_: object) -> int:
        return coordinates[0] * (16 * values[1] + 6 * basis[1])

    @register_flop_formula(torch.ops.gan3d.sparse_sample_sh_backward)
    def _(grad_density: tuple, grad_rgb: tuple, words: tuple, rank: tuple, resolution: list[int], values: tuple,
          coordinates: tuple, basis: tuple, ray_index: tuple | None, needed: list[bool], *, out_shape: tuple,
          **_: object) -> int:
        return coordinates[0] * (16 * sum(needed) * values[1] + 6 * basis[1])

    differentiable("sparse_sample", reference.sparse_sample, wanted=[3, 4], selective=True)
    differentiable("sparse_sample_sh", reference.sparse_sample_sh, wanted=[3, 4, 5], selective=True)
