// Argument checks that the CPU and the CUDA ops of sparse_grid share.
#pragma once

#include <array>
#include <optional>
#include <type_traits>

#include "checks.h"
#include "sparse_grid.h"

namespace gan3d::sparse_grid {

inline VoxelIndex check_voxels(const char* op, const at::Tensor& words, const at::Tensor& rank,
                               at::IntArrayRef resolution, const at::Tensor& like) {
  return gan3d::check_voxels(op, words, rank, check_sides(op, resolution), like);
}

inline void check_points(const char* op, const at::Tensor& values, const at::Tensor& coordinates) {
  check_first(op, "values", values, {-1, -1});
  check(op, "coordinates", coordinates, values.scalar_type(), {-1, 3}, values);
}

// Terms of the basis (1, 4, 9 or 16).
inline int64_t check_basis(const char* op, const at::Tensor& values, const at::Tensor& coordinates,
                           const at::Tensor& basis, const std::optional<at::Tensor>& ray_index) {
  check(op, "basis", basis, values.scalar_type(), {ray_index ? -1 : coordinates.size(0), -1}, values);
  const int64_t k = basis.size(1);
  TORCH_CHECK_VALUE(k == 1 || k == 4 || k == 9 || k == 16, op, ": basis must have 1, 4, 9 or 16 terms, got ", k);
  check(op, "values", values, values.scalar_type(), {-1, 1 + 3 * k}, values);
  TORCH_CHECK_VALUE(basis.size(0) < int64_t(1) << 31, op, ": basis must have fewer than 2^31 rows");
  if (ray_index) check(op, "ray_index", *ray_index, at::kInt, {coordinates.size(0)}, values);
  return k;
}

inline VoxelIndex check_visibility(const at::Tensor& words, const at::Tensor& rank, at::IntArrayRef resolution,
                                   const at::Tensor& density, const at::Tensor& rays_o, const at::Tensor& rays_d,
                                   const at::Tensor& aabb, double step) {
  check_first("visibility", "density", density, {-1});
  check("visibility", "rays_o", rays_o, density.scalar_type(), {-1, 3}, density);
  check("visibility", "rays_d", rays_d, density.scalar_type(), {rays_o.size(0), 3}, density);
  check("visibility", "aabb", aabb, density.scalar_type(), {2, 3}, density);
  // The number of a sample must be exact in float.
  TORCH_CHECK_VALUE(step >= 1.0 / 1024, "visibility: step must be at least 1/1024 voxel, got ", step);
  return check_voxels("visibility", words, rank, resolution, density);
}

// f(terms) with the number of terms known to the compiler.
template <class F>
void with_terms(int64_t k, const F& f) {
  if (k == 1) f(std::integral_constant<int, 1>());
  if (k == 4) f(std::integral_constant<int, 4>());
  if (k == 9) f(std::integral_constant<int, 9>());
  if (k == 16) f(std::integral_constant<int, 16>());
}

}  // namespace gan3d::sparse_grid
