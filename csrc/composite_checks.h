// What the compositing ops are on every device: their argument checks, and where a ray finds its samples.
#pragma once

#include <ATen/core/List.h>

#include <optional>

#include <tuple>

#include "checks.h"
#include "composite.h"

namespace gan3d {

// Where each ray's samples begin: rays of equal length, or a list of offsets.
struct RayOffsets {
  int64_t rays = 0, samples = 0, each = 0;
  const int32_t* narrow = nullptr;
  const int64_t* wide = nullptr;

  HD int64_t operator[](int64_t ray) const {
    return narrow != nullptr ? int64_t(narrow[ray]) : wide != nullptr ? wide[ray] : ray * each;
  }
};

inline void check_features(const char* op, const at::Tensor& features, const std::optional<at::Tensor>& background,
                           int64_t rays, at::IntArrayRef sizes, const at::Tensor& density, double threshold) {
  TORCH_CHECK_VALUE(threshold >= 0 && threshold <= 1, op, ": threshold must lie in [0, 1], got ", threshold);
  check(op, "features", features, density.scalar_type(), sizes, density);
  if (!background) return;
  const int64_t channels = features.size(-1);
  if (background->dim() == 1) check(op, "background", *background, density.scalar_type(), {channels}, density);
  else check(op, "background", *background, density.scalar_type(), {rays, channels}, density);
}

inline RayOffsets check_composite(const char* op, const at::Tensor& density, const at::Tensor& delta,
                                  const at::Tensor& features, const at::Tensor& t,
                                  const std::optional<at::Tensor>& background, double threshold) {
  check_first(op, "density", density, {-1, -1});
  const int64_t n = density.size(0), s = density.size(1);
  check(op, "delta", delta, density.scalar_type(), {n, s}, density);
  check(op, "t", t, density.scalar_type(), {n, s}, density);
  check_features(op, features, background, n, {n, s, -1}, density, threshold);
  return {n, n * s, s};
}

// What the offsets say is checked on the CPU alone: a GPU would have to wait for the answer.
inline RayOffsets check_composite_packed(const char* op, const at::Tensor& density, const at::Tensor& delta,
                                         const at::Tensor& features, const at::Tensor& t, const at::Tensor& offsets,
                                         const std::optional<at::Tensor>& background, double threshold) {
  check_first(op, "density", density, {-1});
  const int64_t n = density.size(0);
  check(op, "delta", delta, density.scalar_type(), {n}, density);
  check(op, "t", t, density.scalar_type(), {n}, density);
  const auto type = offsets.scalar_type();
  TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, op, ": offsets must be int32 or int64, got ", type);
  check(op, "offsets", offsets, type, {-1}, density);
  TORCH_CHECK_VALUE(offsets.size(0) > 0, op, ": offsets must have one entry more than there are rays, got none");
  RayOffsets found{offsets.size(0) - 1, n};
  if (type == at::kInt) found.narrow = offsets.const_data_ptr<int32_t>();
  else found.wide = offsets.const_data_ptr<int64_t>();
  check_features(op, features, background, found.rays, {n, -1}, density, threshold);
  if (!density.is_cpu()) return found;
  bool fit = found[0] == 0 && found[found.rays] == n;
  for (int64_t ray = 0; ray < found.rays; ++ray) fit &= found[ray] <= found[ray + 1];
  TORCH_CHECK_VALUE(fit, op, ": offsets must ascend from 0 to the number of samples, ", n);
  return found;
}

inline void check_gradients(const char* op, const at::Tensor& features, const at::Tensor& depth,
                            const at::Tensor& opacity, const at::Tensor& weights, int64_t rays,
                            const at::Tensor& inputs, const at::Tensor& density, const c10::List<bool>& needed) {
  const auto dtype = density.scalar_type();
  check(op, "grad_features", features, dtype, {rays, inputs.size(-1)}, density);
  check(op, "grad_depth", depth, dtype, {rays}, density);
  check(op, "grad_opacity", opacity, dtype, {rays}, density);
  check(op, "grad_weights", weights, dtype, density.sizes(), density);
  TORCH_CHECK_VALUE(needed.size() == 5, op, ": needed must have five entries, got ", needed.size());
}

// All that is known of the rays, by value.
template <class T>
struct Scene {
  const T *density, *delta, *features, *t, *background;
  int64_t channels, background_stride;
  T threshold;
  RayOffsets offsets;

  // On a GPU offsets are not checked; bad ones must not lead out of the tensors.
  HD int64_t begin(int64_t i) const { return clamp<int64_t>(offsets[i], 0, offsets.samples); }
  HD RaySamples<T> ray(int64_t i) const {
    const int64_t from = begin(i);
    return {density + from, delta + from, features + from * channels, t + from,
            max<int64_t>(begin(i + 1) - from, 0), channels};
  }
  HD const T* behind(int64_t i) const { return background + i * background_stride; }
};

template <class T>
Scene<T> make_scene(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
                    const std::optional<at::Tensor>& background, double threshold, const RayOffsets& offsets) {
  const int64_t channels = features.size(-1);
  return {density.const_data_ptr<T>(), delta.const_data_ptr<T>(), features.const_data_ptr<T>(), t.const_data_ptr<T>(),
          background ? background->const_data_ptr<T>() : nullptr, channels,
          background && background->dim() == 2 ? channels : 0, T(threshold), offsets};
}

// The four ops, checked, from what a device does with rays wherever their samples lie.

using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <auto forward>
Four composite(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
               const std::optional<at::Tensor>& background, double threshold) {
  const auto rays = check_composite("composite", density, delta, features, t, background, threshold);
  return forward(density, delta, features, t, background, threshold, rays);
}

template <auto backward>
Five composite_backward(const at::Tensor& grad_features, const at::Tensor& grad_depth, const at::Tensor& grad_opacity,
                        const at::Tensor& grad_weights, const at::Tensor& density, const at::Tensor& delta,
                        const at::Tensor& features, const at::Tensor& t, const std::optional<at::Tensor>& background,
                        double threshold, const c10::List<bool>& needed) {
  const auto rays = check_composite("composite_backward", density, delta, features, t, background, threshold);
  check_gradients("composite_backward", grad_features, grad_depth, grad_opacity, grad_weights, rays.rays, features,
                  density, needed);
  return backward(grad_features, grad_depth, grad_opacity, grad_weights, density, delta, features, t, background,
                  threshold, needed, rays);
}

template <auto forward>
Four composite_packed(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                      const at::Tensor& t, const at::Tensor& offsets, const std::optional<at::Tensor>& background,
                      double threshold) {
  const auto rays = check_composite_packed("composite_packed", density, delta, features, t, offsets, background,
                                           threshold);
  return forward(density, delta, features, t, background, threshold, rays);
}

template <auto backward>
Five composite_packed_backward(const at::Tensor& grad_features, const at::Tensor& grad_depth,
                               const at::Tensor& grad_opacity, const at::Tensor& grad_weights,
                               const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                               const at::Tensor& t, const at::Tensor& offsets,
                               const std::optional<at::Tensor>& background, double threshold,
                               const c10::List<bool>& needed) {
  const auto rays = check_composite_packed("composite_packed_backward", density, delta, features, t, offsets,
                                           background, threshold);
  check_gradients("composite_packed_backward", grad_features, grad_depth, grad_opacity, grad_weights, rays.rays,
                  features, density, needed);
  return backward(grad_features, grad_depth, grad_opacity, grad_weights, density, delta, features, t, background,
                  threshold, needed, rays);
}

}  // namespace gan3d
