// What composite's CPU and CUDA sides ask of their arguments.
#pragma once

#include <optional>

#include "checks.h"

namespace gan3d {

inline void check_background(const char* op, const std::optional<at::Tensor>& background, const at::Tensor& density,
                             int64_t rays, int64_t c) {
  if (background) check(op, "background", *background, density.scalar_type(), {rays, c}, density);
}

inline void check_dense(const char* op, const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                        const at::Tensor& t, const std::optional<at::Tensor>& background) {
  check_first(op, "density", density, {-1, -1});
  const int64_t n = density.size(0), s = density.size(1);
  const auto dtype = density.scalar_type();
  check(op, "delta", delta, dtype, {n, s}, density);
  check(op, "features", features, dtype, {n, s, -1}, density);
  check(op, "t", t, dtype, {n, s}, density);
  check_background(op, background, density, n, features.size(2));
}

inline void check_packed(const char* op, const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                         const at::Tensor& t, const at::Tensor& offsets, const std::optional<at::Tensor>& background) {
  check_first(op, "density", density, {-1});
  const int64_t n = density.size(0);
  const auto dtype = density.scalar_type();
  check(op, "delta", delta, dtype, {n}, density);
  check(op, "features", features, dtype, {n, -1}, density);
  check(op, "t", t, dtype, {n}, density);
  check(op, "offsets", offsets, at::kLong, {-1}, density);
  TORCH_CHECK_VALUE(offsets.size(0) > 0, op, ": offsets must have one entry more than there are rays, got none");
  check_background(op, background, density, offsets.size(0) - 1, features.size(1));
}

// Offsets are followed as pointers: wrong ones must stop here.
inline void check_offsets(const char* op, const int64_t* offsets, int64_t rays, int64_t samples) {
  bool ordered = offsets[0] == 0 && offsets[rays] == samples;
  for (int64_t r = 0; r < rays; ++r) ordered &= offsets[r] <= offsets[r + 1];
  TORCH_CHECK_VALUE(ordered, op, ": offsets must rise from 0 to the number of samples, ", samples);
}

inline void check_gradients(const char* op, const at::Tensor& g_feature, const at::Tensor& g_depth,
                            const at::Tensor& g_opacity, const at::Tensor& g_weights, const at::Tensor& density,
                            const at::Tensor& features, int64_t rays) {
  const auto dtype = density.scalar_type();
  check(op, "g_feature", g_feature, dtype, {rays, features.size(-1)}, density);
  check(op, "g_depth", g_depth, dtype, {rays}, density);
  check(op, "g_opacity", g_opacity, dtype, {rays}, density);
  check(op, "g_weights", g_weights, dtype, density.sizes(), density);
}

}  // namespace gan3d
