// The argument checks of the marching ops, the same on the CPU and on CUDA devices.
#pragma once

#include <optional>

#include "checks.h"
#include "march.h"

namespace gan3d {

inline void check_grid(const char* op, const at::Tensor& words, const at::Tensor& aabb, at::IntArrayRef resolution,
                       const at::Tensor& like) {
  const int64_t cells = check_sides(op, resolution).count();
  check(op, "words", words, at::kLong, {-1, cells / 64}, like);
  TORCH_CHECK_VALUE(words.size(0) >= 1 && words.size(0) <= kMaxLevels, op, ": words must have 1 to ", kMaxLevels,
                    " levels, got ", words.size(0));
  check(op, "aabb", aabb, like.scalar_type(), {2, 3}, like);
}

inline void check_march(const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& near,
                        const at::Tensor& far, const std::optional<at::Tensor>& words,
                        const std::optional<at::Tensor>& aabb, at::IntArrayRef resolution, double step, double cone,
                        double max_step, int64_t max_samples, int64_t jitter) {
  check_first("march", "rays_o", rays_o, {-1, 3});
  const auto dtype = rays_o.scalar_type();
  const int64_t n = rays_o.size(0);
  check("march", "rays_d", rays_d, dtype, {n, 3}, rays_o);
  check("march", "near", near, dtype, {n}, rays_o);
  check("march", "far", far, dtype, {n}, rays_o);
  TORCH_CHECK_VALUE(n < (int64_t(1) << 31) - 1, "march: too many rays, ", n);
  TORCH_CHECK_VALUE(step > 0 && cone >= 0 && max_step >= step, "march: needs step > 0, cone >= 0 and max_step >= step, "
                    "got ", step, ", ", cone, " and ", max_step);
  TORCH_CHECK_VALUE(max_samples > 0, "march: max_samples must be positive, got ", max_samples);
  TORCH_CHECK_VALUE(jitter >= kMiddle && jitter <= kPerSample, "march: jitter must be 0, 1 or 2, got ", jitter);
  if (!words) return;
  TORCH_CHECK_VALUE(aabb.has_value(), "march: words need aabb");
  check_grid("march", *words, *aabb, resolution, rays_o);
}

inline void check_ray_aabb(const at::Tensor& rays_o, const at::Tensor& rays_d, const at::Tensor& boxes) {
  check_first("ray_aabb", "rays_o", rays_o, {-1, 3});
  check("ray_aabb", "rays_d", rays_d, rays_o.scalar_type(), {rays_o.size(0), 3}, rays_o);
  check("ray_aabb", "boxes", boxes, rays_o.scalar_type(), {-1, 2, 3}, rays_o);
}

inline void check_pack(const at::Tensor& values, const at::Tensor& threshold) {
  check_first("pack_bits", "values", values, {-1});
  TORCH_CHECK_VALUE(values.size(0) % 64 == 0, "pack_bits: values must be a multiple of 64, got ", values.size(0));
  check("pack_bits", "threshold", threshold, values.scalar_type(), {}, values);
}

inline void check_update(const at::Tensor& values, const at::Tensor& index, const at::Tensor& fresh) {
  check_first("update_occupancy", "values", values, {-1});
  check("update_occupancy", "index", index, at::kLong, {-1}, values);
  check("update_occupancy", "fresh", fresh, values.scalar_type(), {index.size(0)}, values);
}

}  // namespace gan3d
