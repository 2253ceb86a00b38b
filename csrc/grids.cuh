#pragma once

#include <ATen/Context.h>

#include <array>
#include <tuple>

#include "cuda.cuh"
#include "grids_checks.h"

namespace gan3d::grids_cuda {

template <class T>
HD Trilinear<T> stencil(const T* p, Sides sides, bool zeros) {
  return zeros ? trilinear<true>(load3(p), sides) : trilinear<false>(load3(p), sides);
}

inline at::Tensor grid_sample_3d(const at::Tensor& grid, const at::Tensor& coordinates, bool zeros) {
  const GridSizes sizes = check_sizes("grid_sample_3d", grid, coordinates);
  const c10::cuda::CUDAGuard guard(grid.device());
  at::Tensor out = at::empty({sizes.batch, sizes.points, sizes.channels}, grid.options());
  AT_DISPATCH_FLOATING_TYPES(grid.scalar_type(), "grid_sample_3d", [&] {
    const scalar_t *v = grid.const_data_ptr<scalar_t>(), *p = coordinates.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(sizes.batch * sizes.points, [=] __device__(int64_t i) {
      const int64_t first = i / sizes.points * sizes.voxels * sizes.channels;
      trilinear_value<0>(v + first, stencil(p + 3 * i, sizes.sides, zeros), int(sizes.channels), y + i * sizes.channels);
    });
  });
  return out;
}

inline std::tuple<at::Tensor, at::Tensor> grid_sample_3d_backward(const at::Tensor& grad, const at::Tensor& grid,
                                                                  const at::Tensor& coordinates, bool zeros,
                                                                  std::array<bool, 2> needed) {
  const GridSizes sizes = check_sizes("grid_sample_3d_backward", grid, coordinates);
  check("grid_sample_3d_backward", "grad", grad, grid.scalar_type(), {sizes.batch, sizes.points, sizes.channels}, grid);
  const c10::cuda::CUDAGuard guard(grid.device());
  const bool to_grid = needed[0], to_coordinates = needed[1];
  if (to_grid) at::globalContext().alertNotDeterministic("gan3d::grid_sample_3d_backward");
  at::Tensor grad_grid = to_grid ? at::zeros_like(grid) : at::empty({0}, grid.options());
  at::Tensor grad_coordinates = to_coordinates ? at::empty_like(coordinates) : at::empty({0}, grid.options());
  AT_DISPATCH_FLOATING_TYPES(grid.scalar_type(), "grid_sample_3d_backward", [&] {
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *v = grid.const_data_ptr<scalar_t>(),
                   *p = coordinates.const_data_ptr<scalar_t>();
    scalar_t *out = grad_grid.mutable_data_ptr<scalar_t>(), *out_p = grad_coordinates.mutable_data_ptr<scalar_t>();
    for_each(sizes.batch * sizes.points, [=] __device__(int64_t i) {
      const int n = int(sizes.channels);
      const int64_t first = i / sizes.points * sizes.voxels * n;
      const auto s = stencil(p + 3 * i, sizes.sides, zeros);
      if (to_grid && !s.nothing())
        for (int corner = 0; corner < 8; ++corner) {
          const scalar_t weight = s.weight(corner);
          scalar_t* to = out + first + s.voxel(corner) * n;
          if (weight != scalar_t(0))
            for (int c = 0; c < n; ++c) atomicAdd(to + c, weight * g[i * n + c]);
        }
      if (to_coordinates) {
        const Vec3<scalar_t> slope = trilinear_slope<0>(v + first, s, n, g + i * n);
        out_p[3 * i] = slope.x, out_p[3 * i + 1] = slope.y, out_p[3 * i + 2] = slope.z;
      }
    });
  });
  return {grad_grid, grad_coordinates};
}

inline at::Tensor triplane_sample(const at::Tensor& planes, const at::Tensor& points, at::IntArrayRef axes,
                                  double scale) {
  const Planes sizes = check_layout("triplane_sample", planes, points, axes);
  const c10::cuda::CUDAGuard guard(planes.device());
  const int64_t n = points.size(1);
  at::Tensor out = at::empty({points.size(0), n, sizes.channels}, points.options());
  AT_DISPATCH_FLOATING_TYPES(planes.scalar_type(), "triplane_sample", [&] {
    const scalar_t *v = planes.const_data_ptr<scalar_t>(), *x = points.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for_each(points.size(0) * n, [=] __device__(int64_t i) {
      Bilinear<scalar_t> s[kPlanes];
      for (int p = 0; p < kPlanes; ++p) s[p] = bilinear(x + 3 * i, p, sizes);
      triplane_value<0>(v + i / n * sizes.batch, s, sizes, scalar_t(scale), y + i * sizes.channels);
    });
  });
  return out;
}

inline std::tuple<at::Tensor, at::Tensor> triplane_sample_backward(const at::Tensor& grad, const at::Tensor& planes,
                                                                   const at::Tensor& points, at::IntArrayRef axes,
                                                                   double scale, std::array<bool, 2> needed) {
  const Planes sizes = check_layout("triplane_sample_backward", planes, points, axes);
  const int64_t n = points.size(1);
  check("triplane_sample_backward", "grad", grad, planes.scalar_type(), {points.size(0), n, sizes.channels}, planes);
  const c10::cuda::CUDAGuard guard(planes.device());
  const bool to_planes = needed[0], to_points = needed[1];
  if (to_planes) at::globalContext().alertNotDeterministic("gan3d::triplane_sample_backward");
  at::Tensor grad_planes = to_planes ? at::zeros_like(planes) : at::empty({0}, planes.options());
  at::Tensor grad_points = to_points ? at::zeros_like(points) : at::empty({0}, planes.options());
  const Planes to_sizes = to_planes ? check_layout("triplane_sample_backward", grad_planes, points, axes) : sizes;
  AT_DISPATCH_FLOATING_TYPES(planes.scalar_type(), "triplane_sample_backward", [&] {
    const scalar_t *g = grad.const_data_ptr<scalar_t>(), *v = planes.const_data_ptr<scalar_t>(),
                   *x = points.const_data_ptr<scalar_t>();
    scalar_t *out = grad_planes.mutable_data_ptr<scalar_t>(), *out_x = grad_points.mutable_data_ptr<scalar_t>();
    const scalar_t factor = scalar_t(scale);
    for_each(points.size(0) * n, [=] __device__(int64_t i) {
      const scalar_t* mine = g + i * sizes.channels;
      for (int p = 0; p < kPlanes; ++p) {
        const auto s = bilinear(x + 3 * i, p, sizes);
        if (s.nothing()) continue;
        if (to_planes) {
          const auto where = bilinear(x + 3 * i, p, to_sizes);
          for (int corner = 0; corner < 4; ++corner) {
            const scalar_t weight = factor * s.weight(corner);
            scalar_t* to = out + i / n * to_sizes.batch + p * to_sizes.plane + where.pixel(corner);
            if (weight != scalar_t(0))
              for (int c = 0; c < sizes.channels; ++c) atomicAdd(to + c, weight * mine[c]);
          }
        }
        if (to_points)
          bilinear_slope<0>(v + i / n * sizes.batch + p * sizes.plane, s, p, sizes, factor, mine, out_x + 3 * i);
      }
    });
  });
  return {grad_planes, grad_points};
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("grid_sample_3d", &grid_sample_3d);
  m.impl("grid_sample_3d_backward", &grid_sample_3d_backward);
  m.impl("triplane_sample", &triplane_sample);
  m.impl("triplane_sample_backward", &triplane_sample_backward);
}

}  // namespace gan3d::grids_cuda
