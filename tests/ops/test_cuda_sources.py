"""The CUDA sources, executed: compiled by the C++ compiler with a stand-in for cuda.cuh that runs the threads of a
kernel one after the other, and compared with the CPU ops. What this cannot show is a GPU's memory and scheduling.
"""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gan3d import ops
from gan3d.ops import extension, reference

pytestmark = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled ops: no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> list[torch.library.Library]:
    """Loads the CUDA sources as `torch.ops.gan3d_emulated`, under the schemas of `torch.ops.gan3d`."""
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("emulated")
    for path in [*extension.CSRC.glob("*.h"), *extension.CSRC.glob("*.cuh")]:
        shutil.copy(path, folder)
    shutil.copy(Path(__file__).with_name("emulated_cuda.cuh"), folder / "cuda.cuh")
    (folder / "emulated.cpp").write_text((extension.CSRC / "ops.cu").read_text())
    library = torch.library.Library("gan3d_emulated", "DEF")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("gan3d::"):
            library.define(str(schema).removeprefix("gan3d::"))
    cpp_extension.load("emulated", [str(folder / "emulated.cpp")], extra_cflags=["-O1", "-ffp-contract=off"],
                       build_directory=str(folder), is_python_module=False)
    return [library]


class Both(TorchDispatchMode):
    """Runs every compiled op a second time, through its CUDA source, and compares."""

    def __init__(self, tolerance: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func.namespace != "gan3d":
            return func(*args, **kwargs)
        twin = getattr(torch.ops.gan3d_emulated, func._schema.name.split("::")[1]).default
        copies = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        out, again = func(*args, **kwargs), twin(*copies[0], **copies[1])
        self.seen.add(func._schema.name)
        for a, b in zip(pytree.tree_leaves(out), pytree.tree_leaves(again), strict=True):
            largest = float(a.double().abs().max()) if a.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=0, atol=self.tolerance * max(1.0, largest))
        return out


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pull(*outputs: torch.Tensor) -> None:
    """A backward pass through random gradients."""
    torch.autograd.backward(outputs, [random(*o.shape, seed=i) for i, o in enumerate(outputs)])


def call_sh() -> None:
    pull(ops.sh(random(33, 3).requires_grad_(True), 4))


def call_composite() -> None:
    density, delta, t = (random(6, 70, seed=i).abs() for i in range(3))
    features, background = random(6, 70, 5).requires_grad_(True), random(6, 5).requires_grad_(True)
    pull(*ops.composite(density.requires_grad_(True), 0.1 * delta, features, t, background, 0.05))
    offsets = torch.tensor([0, 3, 3, 200, 420])
    flat = [x.detach().flatten(0, 1).requires_grad_(True) for x in (density, delta, features, t)]
    pull(*ops.composite_packed(*flat, offsets, background[:4]))


def call_hash_grid() -> None:
    levels = ops.hash_grid_levels(3, 4, 1.6, 8)
    points = torch.cat([random(40, 3).abs() % 1, 5 * random(9, 3)])
    pull(ops.hash_grid(points.requires_grad_(True), random(levels.offsets[-1], 3).requires_grad_(True), levels))
    pull(ops.hash_grid(points.detach(), random(levels.offsets[-1], 2).requires_grad_(True), levels))


def call_march() -> None:
    resolution, box = (8, 8, 8), torch.tensor([[-1.0, -1, -1], [1, 1, 1]], dtype=torch.float64)
    values = ops.update_occupancy(random(2, 512), torch.arange(0, 1024, 3), random(342, seed=1))
    words = ops.pack_bits(values, 0.3)
    assert torch.equal(ops.unpack_bits(words), values > 0.3)
    ops.occupied(3 * random(50, 3), words, box, resolution)
    directions = torch.nn.functional.normalize(random(40, 3, seed=2), dim=-1)
    near, far = ops.ray_aabb(-2 * directions + 0.3 * random(40, 3), directions, box[None])
    for cone, jitter in ((0.0, "none"), (0.05, "sample"), (0.0, "ray")):
        ops.march(-2 * directions, directions, near[:, 0], 2 * far[:, 0], words, box, resolution, 0.1, cone=cone,
                  jitter=jitter, seed=7)


def call_grids() -> None:
    grid = random(2, 5, 6, 4, 13).requires_grad_(True)
    where = (3 * random(2, 300, 3) + 2).requires_grad_(True)
    planes = random(2, 24, 7, 5).to(memory_format=torch.channels_last).requires_grad_(True)
    pull(ops.grid_sample_3d(grid, where), ops.grid_sample_3d(grid, where, "zeros"),
         ops.grid_sample_3d(grid, where.detach()), ops.triplane_sample(planes.unflatten(1, (3, 8)), where / 4))


def call_sparse_grid() -> None:
    mask = torch.rand(32, 32, 32, generator=torch.Generator().manual_seed(1)) < 0.6
    voxels, box = ops.voxels_from_mask(mask), torch.tensor([[-1.0, -1, -1], [1, 1, 1]], dtype=torch.float64)
    rows = int(mask.sum())
    where = (16 + 10 * random(50, 3)).requires_grad_(True)
    pull(ops.sparse_sample(voxels, random(rows, 5).requires_grad_(True), where))
    ray = torch.randint(7, (50,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 9, 16):
        values = random(rows, 1 + 3 * k).requires_grad_(True)
        pull(*ops.sparse_sample_sh(voxels, values, where, random(7, k).requires_grad_(True), ray))
        pull(*ops.sparse_sample_sh(voxels, values, where, random(50, k).requires_grad_(True)))
    eye = 2 * random(99, 3, seed=3)
    ops.visibility(voxels, 9 * random(rows), eye, 0.4 * random(99, 3, seed=4) - eye, box, 0.5, 0.1)


def call_sparse_conv() -> None:
    coarse = ops.voxels_from_mask(random(8, 12, 16) < -0.5)
    fine = ops.upsample_support(coarse)
    up = ops.upsampling_map(coarse, fine)
    values = random(up.rows_in, 5).requires_grad_(True)
    y = ops.sparse_conv3d(values, random(7, 5, 3, 3, 3, seed=1).requires_grad_(True), up)
    pull(ops.sparse_conv3d(y, random(3, 7, 3, 3, 3, seed=2).requires_grad_(True), ops.kernel_map(fine)))
    pull(ops.sparse_upsample(values, up))


def call_octree() -> None:
    rng = torch.Generator().manual_seed(0)
    tree = ops.Octree(reference.build_octree(torch.randint(0, 16, (40, 3), generator=rng), 4))  # built on the host
    points, box = torch.rand(99, 3, generator=rng, dtype=torch.float64), torch.tensor([[-1.0, -1, -1], [1, 2, 1]])
    ops.octree_query(tree, points)
    eye = 3 * random(40, 3)
    directions = torch.nn.functional.normalize(0.5 * random(40, 3, seed=1) - eye, dim=-1)
    occupied = torch.rand(tree.child.numel(), generator=rng) < 0.5
    ops.octree_traverse(tree, eye, directions, box.double())
    ops.octree_traverse(tree, eye, directions, box.double(), occupied=occupied)


def call_tiny_mlp() -> None:
    for widths, bias, activation in [((17, 9, 20), True, "softplus"), ((3, 16, 16, 2), False, "relu")]:
        count = ops.parameter_count(widths, bias)
        pull(ops.tiny_mlp(random(300, widths[0]).requires_grad_(True), random(count).requires_grad_(True), widths, bias,
                          activation))
        order, offsets = ops.sort_by_cell((random(600) * 3).int(), 5)
        pull(ops.tiny_mlp_batch(random(600, widths[0])[order].requires_grad_(True),
                                random(5, count).requires_grad_(True), offsets, widths, bias, activation))


def call_voxels() -> None:
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 12, 16, generator=rng) < 0.3
    voxels = ops.voxels_from_mask(mask)
    assert torch.equal(ops.mask_of(voxels), mask)
    ops.voxels_from_positions(torch.randint(0, 8, (50, 3), generator=rng), (8, 12, 16))
    ops.row_of(voxels, torch.randint(-3, 20, (50, 3), generator=rng))
    rows = len(ops.positions_of(voxels))
    values = random(rows, 3).requires_grad_(True)
    dense = ops.scatter_voxels(values, voxels, 0.5)
    pull(dense, ops.gather_voxels(dense, voxels), ops.upsample_values(values))
    for dilate in (0, 1, 2):
        pruned = ops.prune(voxels, random(rows), 0.8, dilate)
        pull(ops.compact(values, pruned))
    ops.prune_dense(random(8, 12, 16), 0.8, 1)
    ops.upsample(voxels)
    ops.neighbours(voxels)
    ops.rank_words(voxels.words)


@pytest.mark.parametrize("call, names", [
    (call_sh, {"sh", "sh_backward"}),
    (call_composite, {"composite", "composite_backward", "composite_packed", "composite_packed_backward"}),
    (call_hash_grid, {"hash_grid", "hash_grid_backward"}),
    (call_grids, {"grid_sample_3d", "grid_sample_3d_backward", "triplane_sample", "triplane_sample_backward"}),
    (call_sparse_grid, {"sparse_sample", "sparse_sample_backward", "sparse_sample_sh", "sparse_sample_sh_backward",
                        "visibility"}),
    (call_sparse_conv, {"neighbour_pairs", "upsampling_pairs", "conv_rows", "conv_rows_weight"}),
    (call_octree, {"octree_query", "octree_traverse"}),
    (call_tiny_mlp, {"tiny_mlp", "tiny_mlp_backward", "sort_by_cell"}),
    (call_voxels, {"voxels_from_mask", "voxels_from_scores", "voxels_from_positions", "rank_words", "voxel_mask",
                   "voxel_positions", "voxel_rows", "gather_voxels", "scatter_voxels", "prune_voxels", "compact_rows",
                   "spread_rows", "upsample_voxels", "upsample_rows", "pool_rows", "voxel_neighbours"}),
    (call_march, {"ray_aabb", "march", "pack_bits", "occupied", "update_occupancy"}),
])
def test_cuda_source_computes_what_the_cpu_op_does(emulated: list, call, names: set[str]) -> None:
    with Both(1e-12) as both:  # sums of a few hundred terms in another order
        call()
    assert {f"gan3d::{name}" for name in names} <= both.seen
