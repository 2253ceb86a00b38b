#pragma once

#include <ATen/ops/cumsum.h>

#include "cuda.cuh"
#include "march.h"
#include "march_checks.h"

namespace gan3d::march_cuda {

inline std::tuple<at::Tensor, at::Tensor> ray_aabb(const at::Tensor& rays_o, const at::Tensor& rays_d,
                                                   const at::Tensor& boxes, double near, double far) {
  check_ray_aabb(rays_o, rays_d, boxes);
  const c10::cuda::CUDAGuard guard(rays_o.device());
  const int64_t n = rays_o.size(0), m = boxes.size(0);
  at::Tensor enter = at::empty({n, m}, rays_o.options()), leave = at::empty_like(enter);
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "ray_aabb", [&] {
    using T = scalar_t;
    const T *o = rays_o.const_data_ptr<T>(), *d = rays_d.const_data_ptr<T>(), *box = boxes.const_data_ptr<T>();
    T *a = enter.mutable_data_ptr<T>(), *b = leave.mutable_data_ptr<T>();
    for_each(n * m, [=] __device__(int64_t i) {
      const int64_t ray = i / m;
      gan3d::ray_aabb(load3(o + 3 * ray), load3(d + 3 * ray), box + 6 * (i % m), T(near), T(far), a[i], b[i]);
    });
  });
  return {enter, leave};
}

// Everything a thread needs to march ray i, by value.
template <class T>
struct Marcher {
  const T *o, *d, *near, *far, *aabb;
  const int64_t* words;
  Cells cells;
  int64_t levels, jitter, seed, max_samples;
  T step, cone, max_step;

  template <class Emit>
  __device__ void operator()(int64_t i, const Emit& emit) const {
    Occupancy<T> grid{};
    if (words != nullptr) grid = make_occupancy(words, cells, levels, aabb);
    const auto lattice = make_lattice(near[i], step, cone, max_step, jitter, seed, i);
    march_ray(words != nullptr ? &grid : nullptr, lattice, load3(o + 3 * i), load3(d + 3 * i), far[i], emit);
  }
};

// Two passes of the same march: how many samples each ray has, then, once the host knows how many there are, which.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> march(
    const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& near, const at::Tensor& far,
    const std::optional<at::Tensor>& words, const std::optional<at::Tensor>& aabb, at::IntArrayRef resolution,
    double step, double cone, double max_step, int64_t max_samples, int64_t jitter, int64_t seed) {
  check_march(rays_o, rays_d, near, far, words, aabb, resolution, step, cone, max_step, max_samples, jitter);
  const c10::cuda::CUDAGuard guard(rays_o.device());
  const int64_t n = rays_o.size(0);
  at::Tensor counts = at::zeros({n + 1}, rays_o.options().dtype(at::kLong)), offsets, ray_index, ts, deltas;
  AT_DISPATCH_FLOATING_TYPES(rays_o.scalar_type(), "march", [&] {
    using T = scalar_t;
    Marcher<T> marcher{rays_o.const_data_ptr<T>(), rays_d.const_data_ptr<T>(), near.const_data_ptr<T>(),
                       far.const_data_ptr<T>(), nullptr, nullptr, {}, 0, jitter, seed, max_samples, T(step), T(cone),
                       T(max_step)};
    if (words) {
      marcher.aabb = aabb->const_data_ptr<T>(), marcher.words = words->const_data_ptr<int64_t>();
      marcher.cells = make_cells(resolution[0], resolution[1], resolution[2]), marcher.levels = words->size(0);
    }
    int64_t* count = counts.mutable_data_ptr<int64_t>();
    for_each(n, [=] __device__(int64_t i) {
      int64_t found = 0;
      marcher(i, [&](T, T) { return ++found < marcher.max_samples; });
      count[i + 1] = found;
    });
    at::Tensor wide = at::cumsum(counts, 0);
    const int64_t total = wide.select(0, n).item<int64_t>();
    TORCH_CHECK(total < (int64_t(1) << 31), "march: 2^31 samples or more; march fewer rays at once");
    offsets = wide.to(at::kInt);
    ray_index = at::empty({total}, offsets.options());
    ts = at::empty({total}, rays_o.options());
    deltas = at::empty({total}, rays_o.options());
    const int32_t* offset = offsets.const_data_ptr<int32_t>();
    int32_t* index = ray_index.mutable_data_ptr<int32_t>();
    T *t = ts.mutable_data_ptr<T>(), *delta = deltas.mutable_data_ptr<T>();
    for_each(n, [=] __device__(int64_t i) {
      int32_t row = offset[i];
      const int32_t end = offset[i + 1];
      if (row == end) return;
      marcher(i, [&](T at, T length) {
        index[row] = int32_t(i), t[row] = at, delta[row] = length;
        return ++row < end;
      });
    });
  });
  return {offsets, ray_index, ts, deltas};
}

inline at::Tensor pack_bits(const at::Tensor& values, const at::Tensor& threshold) {
  check_pack(values, threshold);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t n = values.numel() / 64;
  at::Tensor words = at::empty({n}, values.options().dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "pack_bits", [&] {
    const scalar_t *v = values.const_data_ptr<scalar_t>(), *limit = threshold.const_data_ptr<scalar_t>();
    int64_t* w = words.mutable_data_ptr<int64_t>();
    for_each(n, [=] __device__(int64_t i) {
      uint64_t word = 0;
      for (int bit = 0; bit < 64; ++bit) word |= uint64_t(v[64 * i + bit] > *limit) << bit;
      w[i] = int64_t(word);
    });
  });
  return words;
}

inline at::Tensor occupied(const at::Tensor& points, const at::Tensor& words, const at::Tensor& aabb,
                           at::IntArrayRef resolution) {
  check_first("occupied", "points", points, {-1, 3});
  check_grid("occupied", words, aabb, resolution, points);
  const c10::cuda::CUDAGuard guard(points.device());
  const int64_t n = points.size(0), levels = words.size(0);
  const Cells cells = make_cells(resolution[0], resolution[1], resolution[2]);
  at::Tensor out = at::empty({n}, points.options().dtype(at::kBool));
  AT_DISPATCH_FLOATING_TYPES(points.scalar_type(), "occupied", [&] {
    const scalar_t *p = points.const_data_ptr<scalar_t>(), *box = aabb.const_data_ptr<scalar_t>();
    const int64_t* w = words.const_data_ptr<int64_t>();
    bool* y = out.mutable_data_ptr<bool>();
    for_each(n, [=] __device__(int64_t i) {
      const auto grid = make_occupancy(w, cells, levels, box);
      const Vec3<scalar_t> at = load3(p + 3 * i);
      y[i] = grid.valid && finite(at) && grid.occupied(at, 0);
    });
  });
  return out;
}

// The largest of non-negative numbers: their bits are in the same order as they are.
__device__ inline void atomic_max(float* at, float v) { atomicMax(reinterpret_cast<int*>(at), __float_as_int(v)); }
__device__ inline void atomic_max(double* at, double v) {
  atomicMax(reinterpret_cast<long long*>(at), __double_as_longlong(v));
}

inline at::Tensor update_occupancy(const at::Tensor& values, const at::Tensor& index, const at::Tensor& fresh,
                                   double decay, bool everywhere) {
  check_update(values, index, fresh);
  const c10::cuda::CUDAGuard guard(values.device());
  const int64_t n = values.size(0), k = index.size(0);
  at::Tensor out = at::empty_like(values);
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "update_occupancy", [&] {
    using T = scalar_t;
    const T *old = values.const_data_ptr<T>(), *v = fresh.const_data_ptr<T>(), factor = T(decay);
    const int64_t* cell = index.const_data_ptr<int64_t>();
    T* y = out.mutable_data_ptr<T>();
    for_each(n, [=] __device__(int64_t i) { y[i] = everywhere ? decayed(old[i], factor) : old[i]; });
    if (!everywhere) {
      for_each(k, [=] __device__(int64_t i) {
        CUDA_KERNEL_ASSERT(uint64_t(cell[i]) < uint64_t(n));
        y[cell[i]] = decayed(old[cell[i]], factor);
      });
    }
    // a maximum is the same in any order; both sides are ≥ 0 where it is taken
    for_each(k, [=] __device__(int64_t i) {
      CUDA_KERNEL_ASSERT(uint64_t(cell[i]) < uint64_t(n));
      if (!(old[cell[i]] < T(0)) && v[i] > T(0)) atomic_max(y + cell[i], v[i]);
    });
  });
  return out;
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("ray_aabb", &ray_aabb);
  m.impl("march", &march);
  m.impl("pack_bits", &pack_bits);
  m.impl("occupied", &occupied);
  m.impl("update_occupancy", &update_occupancy);
}

}  // namespace gan3d::march_cuda
