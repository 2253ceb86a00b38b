"""Spherical harmonics: orthonormal, the reference's values and derivatives."""

import math

import numpy as np
import pytest
import torch

from gan3d import ops
from gan3d.ops import reference


def directions(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    random = torch.Generator().manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, 3, generator=random, dtype=dtype), dim=-1)


def test_bases_are_orthonormal_on_the_sphere() -> None:
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for polynomials of degree 15 in z
    angles = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    z = torch.from_numpy(nodes)[:, None].expand(8, 16)
    r = (1 - z * z).sqrt()
    points = torch.stack([r * angles.cos(), r * angles.sin(), z], -1)
    basis = ops.sh(points, 4)
    weight = torch.from_numpy(weights)[:, None].expand(8, 16) * (2 * math.pi / 16)
    gram = torch.einsum("ijk,ijl,ij->kl", basis, basis, weight)
    torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("n", [0, 1, 37])
def test_matches_the_reference(degree: int, n: int) -> None:
    d = directions(n)
    torch.testing.assert_close(ops.sh(d, degree), reference.sh(d, degree), atol=1e-14, rtol=0)
    low = ops.sh(d.float(), degree)
    torch.testing.assert_close(low, reference.sh(d, degree).float(), atol=1e-6, rtol=0)  # a few roundings of float32


@pytest.mark.parametrize("degree", range(5))
def test_first_and_second_derivatives(degree: int) -> None:
    d = directions(5).requires_grad_(True)
    torch.autograd.gradcheck(lambda x: ops.sh(x, degree), d)
    torch.autograd.gradgradcheck(lambda x: ops.sh(x, degree), d)


@pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
def test_is_a_well_behaved_op() -> None:
    torch.library.opcheck(torch.ops.gan3d.sh, (directions(7).requires_grad_(True), 3))
    torch.library.opcheck(torch.ops.gan3d.sh_backward, (torch.randn(7, 16, dtype=torch.float64), directions(7), 3))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="degree"):
        ops.sh(directions(2), 5)
    with pytest.raises(TypeError, match="(?i)float"):
        ops.sh(torch.zeros(2, 3, dtype=torch.int64), 2)


@pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")
def test_the_op_itself_names_what_is_wrong() -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError), match="directions must be contiguous"):
        torch.ops.gan3d.sh(torch.zeros(3, 4).T[:, :3], 2)
    with pytest.raises((ValueError, RuntimeError), match="directions must have shape"):
        torch.ops.gan3d.sh(torch.zeros(4, 4), 2)
