"""The 3D StyleGAN2: its sparse blocks against dense ones with masks, written out as the released code computes them."""

import math

import pytest
import torch
from torch.nn import functional as F

from gan3d import ops
from gan3d.nn.stylegan2_3d import Pattern, Synthesis3d, SynthesisBlock3d, grown, pattern_of


def random_grid(side: int, share: float, seed: int) -> ops.Voxels:
    return ops.voxels_from_mask(torch.rand(side, side, side, generator=torch.Generator().manual_seed(seed)) < share)


def spread(values: torch.Tensor, grid: ops.Voxels) -> torch.Tensor:
    """[c x y z], 0 where there is no voxel."""
    return ops.scatter_voxels(values, grid).permute(3, 0, 1, 2)


def styled(layer, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Style and demodulation of one image."""
    style = F.linear(w, layer.affine.weight / math.sqrt(w.shape[0]), layer.affine.bias)
    weight = layer.weight * style[:, None, None, None]
    return style, (weight.square().sum((1, 2, 3, 4)) + 1e-8).rsqrt()


def masked_layer(layer, x: torch.Tensor, mask: torch.Tensor, w: torch.Tensor, up: bool
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """A convolution of a dense grid, its weight's axes reversed, whose outputs are cut out by a mask."""
    style, scale = styled(layer, w)
    weight = layer.weight.permute(0, 1, 4, 3, 2)
    x = (x * style[:, None, None, None])[None]
    if up:
        y = F.conv_transpose3d(x, weight.transpose(0, 1), stride=2)[..., :-1, :-1, :-1]
        reach = F.conv_transpose3d(mask[None, None].to(y), y.new_ones(1, 1, 3, 3, 3), stride=2)[0, 0, :-1, :-1, :-1]
        mask = reach > 0.5
    else:
        y = F.conv3d(x, weight, padding=1)
    y = F.leaky_relu(y[0] * scale[:, None, None, None] + layer.bias[:, None, None, None], 0.2) * math.sqrt(2)
    return (y if layer.clamp is None else y.clamp(-layer.clamp, layer.clamp)) * mask, mask


def masked_block(block, x: torch.Tensor, voxels: torch.Tensor, mask: torch.Tensor, ws: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, mask = masked_layer(block.conv0, x, mask, ws[0], True)
    x, mask = masked_layer(block.conv1, x, mask, ws[1], False)
    style = F.linear(ws[2], block.torgb.affine.weight / math.sqrt(len(ws[2])), block.torgb.affine.bias)
    weight = block.torgb.weight[:, :, 0, 0, 0] * (style / math.sqrt(len(style)))
    new = torch.einsum("oi,ixyz->oxyz", weight, x) + block.torgb.bias[:, None, None, None]
    wide = voxels.new_zeros(len(voxels), *(2 * side for side in voxels.shape[1:]))
    wide[:, 1::2, 1::2, 1::2] = voxels
    line = torch.tensor([1.0, 2.0, 1.0], dtype=voxels.dtype)
    cube = (line[:, None, None] * line[:, None] * line / 8).expand(len(voxels), 1, 3, 3, 3)
    return x, (new + F.conv3d(wide[None], cube, padding=1, groups=len(voxels))[0]) * mask, mask


def a_block(**changes) -> SynthesisBlock3d:
    torch.manual_seed(0)
    numbers = {"w_dim": 5, "resolution": 16, "channels": 4, "clamp": 3.0, **changes}
    block = SynthesisBlock3d(6, 5, **numbers).double()
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return block


@pytest.mark.parametrize("shares", [(0.3, 0.02), (1.0, 0.5, 0.1)])
def test_a_sparse_block_is_the_dense_one_with_masks(shares):
    """Values and gradients of a joined batch; 1e-10: sums of a few hundred terms in another order, in float64."""
    block, coarse = a_block(), pattern_of([random_grid(8, share, seed) for seed, share in enumerate(shares)])
    rng = torch.Generator().manual_seed(1)
    ws = torch.randn(len(shares), 3, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    x = torch.randn(sum(coarse.rows), 6, generator=rng, dtype=torch.float64, requires_grad=True)
    voxels = torch.randn(sum(coarse.rows), 4, generator=rng, dtype=torch.float64, requires_grad=True)
    features, values, fine = block.sparse(x, voxels, ws, coarse)

    wanted = []
    parts = zip(coarse.grids, x.split(coarse.rows), voxels.split(coarse.rows), ws, fine.grids, strict=True)
    for grid, some, few, w, finer in parts:
        mask = ops.mask_of(grid)
        dense, image, reached = masked_block(block, spread(some, grid), spread(few, grid), mask, w)
        assert torch.equal(reached, ops.mask_of(finer))
        wanted.append([ops.gather_voxels(d.permute(1, 2, 3, 0).contiguous(), finer) for d in (dense, image)])
    expected = [torch.cat(column) for column in zip(*wanted, strict=True)]
    for mine, theirs in zip((features, values), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=0)
    learnt = [x, voxels, ws, *block.parameters()]
    gradients = [torch.autograd.grad(a.square().sum() + b.sin().sum(), learnt) for a, b in
                 ((features, values), expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-8)


def test_a_pattern_grows_as_a_transposed_convolution_does():
    one = torch.zeros(8, 8, 8, dtype=torch.bool)
    one[2, 3, 7] = True
    mask = ops.mask_of(grown(ops.voxels_from_mask(one)))
    expected = torch.zeros_like(mask)
    expected[4:7, 6:9, 14:16] = True  # the last plane along z is cut off
    assert torch.equal(mask, expected)


def network(**changes) -> Synthesis3d:
    torch.manual_seed(0)
    numbers = {"w_dim": 6, "resolution": 16, "dense_resolution": 8, "channels": 4, "channel_base": 64, "channel_max": 8,
               "channel_min": 4, "clamp": None, **changes}
    return Synthesis3d(**numbers)


def keep_all(i: int, voxels: ops.Voxels, density: torch.Tensor) -> ops.Pruned:
    return ops.prune(voxels, torch.ones_like(density), 0.5)


def keep_dense(i: int, voxels: ops.Voxels, density: torch.Tensor) -> ops.Pruned:
    return ops.prune(voxels, density, float(density.quantile(0.6)))


def test_an_identity_is_the_same_alone_and_in_a_batch():
    net, ws = network(), torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1))
    pattern, values = net(ws, 16, keep_dense, True)
    for i, (grid, rows) in enumerate(zip(pattern.grids, values.split(pattern.rows), strict=True)):
        alone, table = net(ws[i:i + 1], 16, keep_dense, True)
        assert torch.equal(ops.mask_of(alone.grids[0]), ops.mask_of(grid))
        torch.testing.assert_close(table, rows, atol=1e-5, rtol=1e-5)  # sums in another order


@pytest.mark.parametrize("resolution, dense, calls", [(4, 8, []), (8, 8, []), (16, 8, [8]), (16, 4, [4, 8]),
                                                      (16, 16, [])])
def test_pruning_follows_every_block_from_the_dense_resolution_on_but_the_last(resolution, dense, calls):
    sides: list[int] = []

    def prune(i: int, voxels: ops.Voxels, density: torch.Tensor) -> ops.Pruned:
        sides.append(voxels.resolution[0])
        return keep_all(i, voxels, density)

    net, ws = network(dense_resolution=dense), torch.zeros(1, 6, 6)
    pattern, values = net(ws, resolution, prune, False)
    assert sides == calls and pattern.rows == [resolution**3] and values.shape == (resolution**3, 4)
    sides.clear()
    net(ws, resolution, prune, True)
    assert sides == [*calls, resolution]


def test_dense_blocks_double_and_sum_up():
    """Without features, voxels are the sum of the biases enlarged, whatever the enlarging: constants stay constant."""
    net = network(dense_resolution=16)
    with torch.no_grad():
        for r in (4, 8, 16):
            block = getattr(net, f"b{r}")
            block.torgb.weight.zero_()
            block.torgb.bias.fill_(r)
        _, values = net(torch.zeros(1, 6, 6), 16, keep_all, False)
    torch.testing.assert_close(values, torch.full_like(values, 28.0))


def test_every_row_knows_its_grid():
    pattern = Pattern([random_grid(4, 0.5, 0)] * 3, [2, 0, 3])
    assert pattern.owner.tolist() == [0, 0, 2, 2, 2]
