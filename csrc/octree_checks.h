// What the CPU and the CUDA side of the octree ops ask of their arguments.
#pragma once

#include <optional>

#include "checks.h"
#include "octree.h"

namespace gan3d {

inline OctreeNodes check_octree(const char* op, const at::Tensor& child, const at::Tensor& like) {
  check(op, "child", child, at::kInt, {-1, 2, 2, 2}, like);
  TORCH_CHECK_VALUE(child.size(0) > 0 && child.size(0) < (1 << 28), op, ": child must have 1 to 2^28 − 1 nodes, got ",
                    child.size(0));
  return {child.const_data_ptr<int32_t>(), int32_t(child.size(0))};
}

// Returns the flags of the leaves to report, or null for all.
inline const uint8_t* check_traverse(const at::Tensor& child, const at::Tensor& rays_o, const at::Tensor& rays_d,
                                     const at::Tensor& aabb, const std::optional<at::Tensor>& occupied, double near,
                                     double far, int64_t max_leaves) {
  const char* op = "octree_traverse";
  check_first(op, "rays_o", rays_o, {-1, 3});
  check(op, "rays_d", rays_d, rays_o.scalar_type(), {rays_o.size(0), 3}, rays_o);
  check(op, "aabb", aabb, rays_o.scalar_type(), {2, 3}, rays_o);
  TORCH_CHECK_VALUE(rays_o.size(0) < (int64_t(1) << 31), op, ": 2^31 rays or more");
  TORCH_CHECK_VALUE(near - near == 0 && far == far, op, ": near must be finite and far a number, got ", near, " and ", far);
  TORCH_CHECK_VALUE(max_leaves > 0, op, ": max_leaves must be positive, got ", max_leaves);
  if (!occupied) return nullptr;
  check(op, "occupied", *occupied, at::kByte, {8 * child.size(0)}, rays_o);
  return occupied->const_data_ptr<uint8_t>();
}

}  // namespace gan3d
