#pragma once

#include <ATen/Context.h>

#include "cuda.cuh"
#include "sparse_grid_checks.h"

namespace gan3d::sparse_grid_cuda {

using namespace sparse_grid;
using at::Tensor;
using Index = std::optional<Tensor>;

inline Tensor sparse_sample(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution, const Tensor& values,
                            const Tensor& coordinates) {
  check_points("sparse_sample", values, coordinates);
  const VoxelIndex grid = check_voxels("sparse_sample", words, rank, resolution, values);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t n = coordinates.size(0), channels = values.size(1);
  Tensor out = at::empty({n, channels}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample", [&] {
    using T = scalar_t;
    const T *table = values.const_data_ptr<T>(), *points = coordinates.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    for_each(n, [=] __device__(int64_t i) {
      const Corners<T> corners = find_corners(grid, find_place(grid.cells, load3(points + 3 * i)));
      for (int64_t c = 0; c < channels; ++c) interpolate<T, 1>(corners, table + c, channels, result + i * channels + c);
    });
  });
  return out;
}

inline std::tuple<Tensor, Tensor> sparse_sample_backward(const Tensor& grad, const Tensor& words, const Tensor& rank,
                                                         at::IntArrayRef resolution, const Tensor& values,
                                                         const Tensor& coordinates, std::array<bool, 2> needed) {
  const char* op = "sparse_sample_backward";
  check_points(op, values, coordinates);
  const VoxelIndex grid = check_voxels(op, words, rank, resolution, values);
  const int64_t n = coordinates.size(0), channels = values.size(1);
  check(op, "grad", grad, values.scalar_type(), {n, channels}, values);
  if (needed[0]) at::globalContext().alertNotDeterministic("gan3d::sparse_sample_backward");
  const c10::cuda::CUDAGuard guard(values.device());
  Tensor to_values = needed[0] ? at::zeros_like(values) : at::empty({0}, values.options());
  Tensor to_coordinates = needed[1] ? at::empty_like(coordinates) : at::empty({0}, values.options());
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_backward", [&] {
    using T = scalar_t;
    const T *table = values.const_data_ptr<T>(), *points = coordinates.const_data_ptr<T>(),
            *g = grad.const_data_ptr<T>();
    T* v = needed[0] ? to_values.mutable_data_ptr<T>() : nullptr;
    T* p = needed[1] ? to_coordinates.mutable_data_ptr<T>() : nullptr;
    for_each(n, [=] __device__(int64_t i) {
      const Place<T> place = find_place(grid.cells, load3(points + 3 * i));
      const Corners<T> corners = find_corners(grid, place);
      Vec3<T> sum{0, 0, 0};
      for (int64_t c = 0; c < channels; ++c) {
        const T upstream[1] = {g[i * channels + c]};
        if (v)
          for (int q = 0; q < 8; ++q)
            if (corners.row[q] >= 0) atomicAdd(v + corners.row[q] * channels + c, corners.weight[q] * upstream[0]);
        if (p) {
          const Vec3<T> part = place_gradient<T, 1>(corners, place, table + c, channels, upstream);
          sum.x += part.x, sum.y += part.y, sum.z += part.z;
        }
      }
      if (p) store_place_gradient(grid, points + 3 * i, sum, p + 3 * i);
    });
  });
  return {to_values, to_coordinates};
}

template <class T>
struct ShPoints {
  VoxelIndex grid;
  const T *values, *coordinates, *basis;
  const int32_t* ray;
  int64_t n;
};

template <int K, class T>
void sample_sh(const ShPoints<T>& in, T* density, T* rgb) {
  for_each(in.n, [=] __device__(int64_t i) {
    constexpr int C = 1 + 3 * K;
    T channels[C];
    const Corners<T> corners = find_corners(in.grid, find_place(in.grid.cells, load3(in.coordinates + 3 * i)));
    interpolate<T, C>(corners, in.values, C, channels);
    evaluate_sh<K>(channels, in.basis + (in.ray ? int64_t(in.ray[i]) : i) * K, density + i, rgb + 3 * i);
  });
}

// Gradients of values, coordinates and basis, each unless null.
template <int K, class T>
void sample_sh_backward(const ShPoints<T>& in, const T* grad_density, const T* grad_rgb, T* v, T* p, T* b) {
  for_each(in.n, [=] __device__(int64_t i) {
    constexpr int C = 1 + 3 * K;
    const Place<T> place = find_place(in.grid.cells, load3(in.coordinates + 3 * i));
    const Corners<T> corners = find_corners(in.grid, place);
    const int64_t row = in.ray ? int64_t(in.ray[i]) : i;
    const T* g = grad_rgb + 3 * i;
    T upstream[C];
    evaluate_sh_backward<K>(grad_density[i], g, in.basis + row * K, upstream);
    if (v)
      for (int q = 0; q < 8; ++q)
        if (corners.row[q] >= 0)
          for (int c = 0; c < C; ++c) atomicAdd(v + int64_t(corners.row[q]) * C + c, corners.weight[q] * upstream[c]);
    if (p)
      store_place_gradient(in.grid, in.coordinates + 3 * i,
                           place_gradient<T, C>(corners, place, in.values, C, upstream), p + 3 * i);
    if (b && corners.any) {
      T channels[C];
      interpolate<T, C>(corners, in.values, C, channels);
      const T* c = channels + 1;
      for (int t = 0; t < K; ++t) atomicAdd(b + row * K + t, g[0] * c[t] + g[1] * c[K + t] + g[2] * c[2 * K + t]);
    }
  });
}

// A ray_index out of range is not noticed here: that would wait for the device.
inline std::tuple<Tensor, Tensor> sparse_sample_sh(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution,
                                                   const Tensor& values, const Tensor& coordinates, const Tensor& basis,
                                                   const Index& ray_index) {
  check_points("sparse_sample_sh", values, coordinates);
  const VoxelIndex grid = check_voxels("sparse_sample_sh", words, rank, resolution, values);
  const int64_t k = check_basis("sparse_sample_sh", values, coordinates, basis, ray_index), n = coordinates.size(0);
  const c10::cuda::CUDAGuard guard(values.device());
  Tensor density = at::empty({n}, values.options()), rgb = at::empty({n, 3}, values.options());
  const int32_t* ray = ray_index ? ray_index->const_data_ptr<int32_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_sh", [&] {
    using T = scalar_t;
    const ShPoints<T> in{grid, values.const_data_ptr<T>(), coordinates.const_data_ptr<T>(), basis.const_data_ptr<T>(),
                         ray, n};
    with_terms(k, [&](auto terms) {
      sample_sh<decltype(terms)::value>(in, density.mutable_data_ptr<T>(), rgb.mutable_data_ptr<T>());
    });
  });
  return {density, rgb};
}

inline std::tuple<Tensor, Tensor, Tensor> sparse_sample_sh_backward(
    const Tensor& grad_density, const Tensor& grad_rgb, const Tensor& words, const Tensor& rank,
    at::IntArrayRef resolution, const Tensor& values, const Tensor& coordinates, const Tensor& basis,
    const Index& ray_index, std::array<bool, 3> needed) {
  const char* op = "sparse_sample_sh_backward";
  check_points(op, values, coordinates);
  const VoxelIndex grid = check_voxels(op, words, rank, resolution, values);
  const int64_t k = check_basis(op, values, coordinates, basis, ray_index), n = coordinates.size(0);
  check(op, "grad_density", grad_density, values.scalar_type(), {n}, values);
  check(op, "grad_rgb", grad_rgb, values.scalar_type(), {n, 3}, values);
  if (needed[0] || (needed[2] && ray_index))
    at::globalContext().alertNotDeterministic("gan3d::sparse_sample_sh_backward");
  const c10::cuda::CUDAGuard guard(values.device());
  Tensor to_values = needed[0] ? at::zeros_like(values) : at::empty({0}, values.options());
  Tensor to_coordinates = needed[1] ? at::empty_like(coordinates) : at::empty({0}, values.options());
  Tensor to_basis = needed[2] ? at::zeros_like(basis) : at::empty({0}, values.options());
  const int32_t* ray = ray_index ? ray_index->const_data_ptr<int32_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "sparse_sample_sh_backward", [&] {
    using T = scalar_t;
    const ShPoints<T> in{grid, values.const_data_ptr<T>(), coordinates.const_data_ptr<T>(), basis.const_data_ptr<T>(),
                         ray, n};
    T* v = needed[0] ? to_values.mutable_data_ptr<T>() : nullptr;
    T* p = needed[1] ? to_coordinates.mutable_data_ptr<T>() : nullptr;
    T* b = needed[2] ? to_basis.mutable_data_ptr<T>() : nullptr;
    with_terms(k, [&](auto terms) {
      sample_sh_backward<decltype(terms)::value>(in, grad_density.const_data_ptr<T>(), grad_rgb.const_data_ptr<T>(), v,
                                                 p, b);
    });
  });
  return {to_values, to_coordinates, to_basis};
}

inline Tensor visibility(const Tensor& words, const Tensor& rank, at::IntArrayRef resolution, const Tensor& density,
                         const Tensor& rays_o, const Tensor& rays_d, const Tensor& aabb, double step, double stop) {
  const VoxelIndex grid = check_visibility(words, rank, resolution, density, rays_o, rays_d, aabb, step);
  const c10::cuda::CUDAGuard guard(density.device());
  Tensor out = at::zeros_like(density);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "visibility", [&] {
    using T = scalar_t;
    using Bits = decltype(bits_of(T()));
    const T *sigma = density.const_data_ptr<T>(), *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(),
            *box = aabb.const_data_ptr<T>();
    Bits* weights = reinterpret_cast<Bits*>(out.mutable_data_ptr<T>());
    for_each(rays_o.size(0), [=] __device__(int64_t i) {
      const GridRay<T> ray = enter(grid.cells, o + 3 * i, d + 3 * i, box, T(step));
      walk(grid, sigma, ray, T(step), T(stop),
           [=](int32_t row, T weight) { atomicMax(weights + row, bits_of(weight)); });
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("sparse_sample", &sparse_sample);
  m.impl("sparse_sample_backward", &sparse_sample_backward);
  m.impl("sparse_sample_sh", &sparse_sample_sh);
  m.impl("sparse_sample_sh_backward", &sparse_sample_sh_backward);
  m.impl("visibility", &visibility);
}

}  // namespace gan3d::sparse_grid_cuda
