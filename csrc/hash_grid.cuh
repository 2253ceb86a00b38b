#pragma once

#include <ATen/Context.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda.cuh"
#include "hash_grid.h"
#include "hash_grid_checks.h"

namespace gan3d::hash_grid_cuda {

inline at::Tensor hash_grid(const at::Tensor& points, const at::Tensor& table, at::ArrayRef<double> scales,
                            at::IntArrayRef resolutions, at::IntArrayRef offsets) {
  const auto levels = check_hash_grid("hash_grid", points, table, scales, resolutions, offsets);
  const c10::cuda::CUDAGuard guard(points.device());
  const int64_t n = points.size(0), features = table.size(1), width = int64_t(levels.size()) * features;
  at::Tensor out = at::empty({n, width}, points.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "hash_grid", [&] {
    const scalar_t *x = points.const_data_ptr<scalar_t>(), *values = table.const_data_ptr<scalar_t>();
    scalar_t* y = out.mutable_data_ptr<scalar_t>();
    for (const HashLevel level : levels) {  // a kernel each: its rows share the cache with no other level's
      for_each(n, [=] __device__(int64_t i) {
        const HashCorners<scalar_t> corners = hash_corners(level, load3(x + 3 * i));
        for (int64_t f = 0; f < features; ++f) {
          const scalar_t* column = values + level.first * features + f;
          scalar_t total = column[corners.row[0] * features] * corners.weight(0);
          for (int c = 1; c < 8; ++c) total += column[corners.row[c] * features] * corners.weight(c);
          y[i * width + f] = total;
        }
      });
      y += features;
    }
  });
  return out;
}

inline std::tuple<at::Tensor, at::Tensor> hash_grid_backward(const at::Tensor& grad, const at::Tensor& points,
                                                             const at::Tensor& table, at::ArrayRef<double> scales,
                                                             at::IntArrayRef resolutions, at::IntArrayRef offsets,
                                                             std::array<bool, 2> needed) {
  const auto levels = check_hash_grid("hash_grid_backward", points, table, scales, resolutions, offsets);
  const int64_t n = points.size(0), features = table.size(1), width = int64_t(levels.size()) * features;
  check("hash_grid_backward", "grad", grad, points.scalar_type(), {n, width}, points);
  if (needed[1]) at::globalContext().alertNotDeterministic("gan3d::hash_grid_backward");
  const c10::cuda::CUDAGuard guard(points.device());
  at::Tensor of_points = needed[0] ? at::zeros_like(points) : at::empty({0}, points.options());
  at::Tensor of_table = needed[1] ? at::zeros_like(table) : at::empty({0}, table.options());
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "hash_grid_backward", [&] {
    const scalar_t *x = points.const_data_ptr<scalar_t>(), *values = table.const_data_ptr<scalar_t>();
    const scalar_t* g = grad.const_data_ptr<scalar_t>();
    scalar_t* gx = needed[0] ? of_points.mutable_data_ptr<scalar_t>() : nullptr;
    scalar_t* gt = needed[1] ? of_table.mutable_data_ptr<scalar_t>() : nullptr;
    for (const HashLevel level : levels) {
      for_each(n, [=] __device__(int64_t i) {
        const HashCorners<scalar_t> corners = hash_corners(level, load3(x + 3 * i));
        for (int c = 0; c < 8; ++c) {
          const int64_t row = (level.first + corners.row[c]) * features;
          const scalar_t weight = corners.weight(c);
          scalar_t worth = 0;  // derivative of the loss by the weight
          for (int64_t f = 0; f < features; ++f) {
            if (gt) atomicAdd(gt + row + f, g[i * width + f] * weight);
            if (gx) worth += g[i * width + f] * values[row + f];
          }
          if (gx)
            for (int a = 0; a < 3; ++a) gx[3 * i + a] += worth * scalar_t(level.scale) * corners.slope(c, a);
        }
      });
      g += features;
    }
  });
  return {of_points, of_table};
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("hash_grid", &hash_grid);
  m.impl("hash_grid_backward", &hash_grid_backward);
}

}  // namespace gan3d::hash_grid_cuda
