"""Every op in plain PyTorch, as its equation reads: fallback, oracle, and second derivative of the compiled one."""

from gan3d.ops.reference.composite import composite as composite
from gan3d.ops.reference.composite import composite_packed as composite_packed
from gan3d.ops.reference.grids import grid_sample_3d as grid_sample_3d
from gan3d.ops.reference.grids import triplane_sample as triplane_sample
from gan3d.ops.reference.hash_grid import hash_grid as hash_grid
from gan3d.ops.reference.march import march as march
from gan3d.ops.reference.march import ray_aabb as ray_aabb
from gan3d.ops.reference.occupancy import occupied as occupied
from gan3d.ops.reference.occupancy import pack_bits as pack_bits
from gan3d.ops.reference.occupancy import unpack_bits as unpack_bits
from gan3d.ops.reference.occupancy import update_occupancy as update_occupancy
from gan3d.ops.reference.octree import build_octree as build_octree
from gan3d.ops.reference.octree import octree_query as octree_query
from gan3d.ops.reference.octree import octree_traverse as octree_traverse
from gan3d.ops.reference.sh import sh as sh
from gan3d.ops.reference.sparse_grid import sparse_sample as sparse_sample
from gan3d.ops.reference.sparse_grid import sparse_sample_sh as sparse_sample_sh
from gan3d.ops.reference.sparse_grid import visibility as visibility
from gan3d.ops.reference.tiny_mlp import tiny_mlp as tiny_mlp
from gan3d.ops.reference.tiny_mlp import tiny_mlp_batch as tiny_mlp_batch
