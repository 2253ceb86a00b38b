// The argument checks of the dense grids and planes, the same on the CPU and on CUDA devices.
#pragma once

#include "checks.h"
#include "trilinear.h"
#include "triplane.h"

namespace gan3d {

struct GridSizes {
  int64_t batch, points, channels, voxels;  // points and voxels of one batch element
  Sides sides;
};

inline GridSizes check_sizes(const char* op, const at::Tensor& grid, const at::Tensor& coordinates) {
  check_first(op, "grid", grid, {-1, -1, -1, -1, -1});
  check(op, "coordinates", coordinates, grid.scalar_type(), {grid.size(0), -1, 3}, grid);
  const int64_t x = grid.size(1), y = grid.size(2), z = grid.size(3);
  TORCH_CHECK_VALUE(x > 0 && y > 0 && z > 0, op, ": grid must have sides of at least 1, got ", grid.sizes());
  constexpr int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(x < limit && y < limit && z < limit && grid.size(4) < limit, op,
                    ": at most 2^31 - 1 voxels along a side");
  return {grid.size(0), coordinates.size(1), grid.size(4), x * y * z, {int32_t(x), int32_t(y), int32_t(z)}};
}

inline Planes check_layout(const char* op, const at::Tensor& planes, const at::Tensor& points, at::IntArrayRef axes) {
  const auto dtype = planes.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, op, ": planes must be float32 or float64, got ", dtype);
  TORCH_CHECK_VALUE(planes.dim() == 5 && planes.size(1) == kPlanes && planes.size(3) > 0 && planes.size(4) > 0, op,
                    ": planes must have shape [b, 3, c, h, w] with h and w of at least 1, got ", planes.sizes());
  TORCH_CHECK_VALUE(planes.size(2) < 2 || planes.numel() == 0 || planes.stride(2) == 1, op,
                    ": the channels of planes must be contiguous (channels_last), got strides ", planes.strides());
  check(op, "points", points, dtype, {planes.size(0), -1, 3}, planes);
  constexpr int64_t limit = int64_t(1) << 31;
  TORCH_CHECK_VALUE(planes.size(2) < limit && planes.size(3) < limit && planes.size(4) < limit, op,
                    ": at most 2^31 - 1 pixels along a side");
  Planes found{int32_t(planes.size(3)), int32_t(planes.size(4)), int32_t(planes.size(2)), planes.stride(0),
               planes.stride(1), planes.stride(3), planes.stride(4), {}};
  TORCH_CHECK_VALUE(axes.size() == 2 * kPlanes, op, ": axes must be ", 2 * kPlanes, " numbers, got ", axes.size());
  for (int i = 0; i < 2 * kPlanes; ++i) {
    TORCH_CHECK_VALUE(axes[i] >= 0 && axes[i] < 3, op, ": axes must be 0, 1 or 2, got ", axes);
    found.axes[i] = int32_t(axes[i]);
  }
  return found;
}

}  // namespace gan3d
