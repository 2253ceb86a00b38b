"""The Python face of csrc/: functions that check what they are given, choose the fastest path there is, and call it.

Tensors may be float32 or float64; half-precision ones are computed in float32. Ops are compiled on first use
(`extension`); `backend()` names the path taken. `reference` states each op in plain PyTorch.
"""

from gan3d.ops.cells import Voxels as Voxels
from gan3d.ops.composite import Composite as Composite
from gan3d.ops.composite import composite as composite
from gan3d.ops.composite import composite_packed as composite_packed
from gan3d.ops.conv3x3 import conv3x3 as conv3x3
from gan3d.ops.conv3x3 import upconv3x3 as upconv3x3
from gan3d.ops.extension import backend as backend
from gan3d.ops.grids import XY_XZ_ZX as XY_XZ_ZX
from gan3d.ops.grids import XY_XZ_ZY as XY_XZ_ZY
from gan3d.ops.grids import grid_sample_3d as grid_sample_3d
from gan3d.ops.grids import triplane_sample as triplane_sample
from gan3d.ops.grids import voxel_coordinates as voxel_coordinates
from gan3d.ops.hash_grid import HashGridLevels as HashGridLevels
from gan3d.ops.hash_grid import hash_grid as hash_grid
from gan3d.ops.hash_grid import hash_grid_levels as hash_grid_levels
from gan3d.ops.march import Samples as Samples
from gan3d.ops.march import march as march
from gan3d.ops.march import ray_aabb as ray_aabb
from gan3d.ops.occupancy import occupancy_threshold as occupancy_threshold
from gan3d.ops.occupancy import occupied as occupied
from gan3d.ops.occupancy import pack_bits as pack_bits
from gan3d.ops.occupancy import unpack_bits as unpack_bits
from gan3d.ops.occupancy import update_occupancy as update_occupancy
from gan3d.ops.octree import Octree as Octree
from gan3d.ops.octree import Segments as Segments
from gan3d.ops.octree import build_octree as build_octree
from gan3d.ops.octree import octree_query as octree_query
from gan3d.ops.octree import octree_traverse as octree_traverse
from gan3d.ops.octree import refine_octree as refine_octree
from gan3d.ops.sh import sh as sh
from gan3d.ops.sparse_conv import KernelMap as KernelMap
from gan3d.ops.sparse_conv import join_maps as join_maps
from gan3d.ops.sparse_conv import kernel_map as kernel_map
from gan3d.ops.sparse_conv import sparse_conv3d as sparse_conv3d
from gan3d.ops.sparse_conv import sparse_upsample as sparse_upsample
from gan3d.ops.sparse_conv import upsample_support as upsample_support
from gan3d.ops.sparse_conv import upsampling_map as upsampling_map
from gan3d.ops.sparse_grid import sparse_sample as sparse_sample
from gan3d.ops.sparse_grid import sparse_sample_sh as sparse_sample_sh
from gan3d.ops.sparse_grid import visibility as visibility
from gan3d.ops.tiny_mlp import layers as layers
from gan3d.ops.tiny_mlp import parameter_count as parameter_count
from gan3d.ops.tiny_mlp import sort_by_cell as sort_by_cell
from gan3d.ops.tiny_mlp import tiny_mlp as tiny_mlp
from gan3d.ops.tiny_mlp import tiny_mlp_batch as tiny_mlp_batch
from gan3d.ops.voxels import Pruned as Pruned
from gan3d.ops.voxels import Upsampled as Upsampled
from gan3d.ops.voxels import compact as compact
from gan3d.ops.voxels import gather_voxels as gather_voxels
from gan3d.ops.voxels import mask_of as mask_of
from gan3d.ops.voxels import neighbours as neighbours
from gan3d.ops.voxels import positions_of as positions_of
from gan3d.ops.voxels import prune as prune
from gan3d.ops.voxels import prune_dense as prune_dense
from gan3d.ops.voxels import rank_words as rank_words
from gan3d.ops.voxels import row_of as row_of
from gan3d.ops.voxels import scatter_voxels as scatter_voxels
from gan3d.ops.voxels import upsample as upsample
from gan3d.ops.voxels import upsample_values as upsample_values
from gan3d.ops.voxels import voxels_from_mask as voxels_from_mask
from gan3d.ops.voxels import voxels_from_positions as voxels_from_positions
