#pragma once

#include <ATen/ops/cumsum.h>

#include "cuda.cuh"
#include "octree.h"
#include "octree_checks.h"

namespace gan3d::octree_cuda {

inline std::tuple<at::Tensor, at::Tensor> octree_query(const at::Tensor& child, const at::Tensor& points) {
  check_first("octree_query", "points", points, {-1, 3});
  const OctreeNodes tree = check_octree("octree_query", child, points);
  const c10::cuda::CUDAGuard guard(points.device());
  const int64_t n = points.size(0);
  at::Tensor leaf = at::empty({n}, child.options()), side = at::empty({n}, points.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "octree_query", [&] {
    const scalar_t* p = points.const_data_ptr<scalar_t>();
    int32_t* found = leaf.mutable_data_ptr<int32_t>();
    scalar_t* edge = side.mutable_data_ptr<scalar_t>();
    for_each(n, [=] __device__(int64_t i) {
      int32_t units;
      found[i] = gan3d::octree_query(tree, load3(p + 3 * i), units);
      edge[i] = scalar_t(units) / scalar_t(kOctreeSide);
    });
  });
  return {leaf, side};
}

// Two passes over the same way: how many pieces each ray has, then, once the host knows how many there are, which.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> octree_traverse(
    const at::Tensor& child, const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& aabb,
    const std::optional<at::Tensor>& occupied, double near, double far, int64_t max_leaves) {
  const OctreeNodes tree = check_octree("octree_traverse", child, rays_o);
  const uint8_t* flags = check_traverse(child, rays_o, rays_d, aabb, occupied, near, far, max_leaves);
  const c10::cuda::CUDAGuard guard(rays_o.device());
  const int64_t n = rays_o.size(0);
  at::Tensor counts = at::zeros({n + 1}, rays_o.options().dtype(at::kLong)), offsets, ray_index, leaves, ts, deltas;
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "octree_traverse", [&] {
    using T = scalar_t;
    const T *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(), *box = aabb.const_data_ptr<T>();
    const T from = T(near), to = T(far);
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    for_each(n, [=] __device__(int64_t i) {
      int64_t found = 0;
      octree_traverse_ray(tree, make_octree_ray(load3(o + 3 * i), load3(d + 3 * i), box, from, to),
                          [&](int32_t leaf, T, T) {
                            found += flags == nullptr || flags[leaf] ? 1 : 0;
                            return found < max_leaves;
                          });
      count[i + 1] = found;
    });
    at::Tensor wide = at::cumsum(counts, 0);
    const int64_t total = wide.select(0, n).item<int64_t>();
    TORCH_CHECK(total < (int64_t(1) << 31), "octree_traverse: 2^31 pieces or more; traverse fewer rays at once");
    offsets = wide.to(at::kInt);
    ray_index = at::empty({total}, offsets.options());
    leaves = at::empty({total}, offsets.options());
    ts = at::empty({total}, rays_o.options());
    deltas = at::empty({total}, rays_o.options());
    const int32_t* offset = offsets.const_data_ptr<int32_t>();
    int32_t *index = ray_index.mutable_data_ptr<int32_t>(), *found = leaves.mutable_data_ptr<int32_t>();
    T *t = ts.mutable_data_ptr<T>(), *delta = deltas.mutable_data_ptr<T>();
    for_each(n, [=] __device__(int64_t i) {
      int32_t row = offset[i];
      const int32_t end = offset[i + 1];
      if (row == end) return;
      octree_traverse_ray(tree, make_octree_ray(load3(o + 3 * i), load3(d + 3 * i), box, from, to),
                          [&](int32_t leaf, T enter, T exit) {
                            if (flags != nullptr && !flags[leaf]) return true;
                            index[row] = int32_t(i), found[row] = leaf;
                            t[row] = (enter + exit) * T(0.5), delta[row] = exit - enter;
                            return ++row < end;
                          });
    });
  });
  return {offsets, ray_index, leaves, ts, deltas};
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("octree_query", &octree_query);
  m.impl("octree_traverse", &octree_traverse);
}

}  // namespace gan3d::octree_cuda
