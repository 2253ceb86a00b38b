#pragma once

#include <ATen/ops/mv.h>

#include "composite.h"
#include "composite_checks.h"
#include "cuda.cuh"

namespace gan3d::composite_cuda {

inline Four forward(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
                    const std::optional<at::Tensor>& background, double threshold, const RayOffsets& offsets) {
  const c10::cuda::CUDAGuard guard(density.device());
  at::Tensor sums = at::empty({offsets.rays, features.size(-1)}, density.options()), weights = at::empty_like(density);
  at::Tensor depths = at::empty({offsets.rays}, density.options()), opacities = at::empty_like(depths);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite", [&] {
    using T = scalar_t;
    const auto scene = make_scene<T>(density, delta, features, t, background, threshold, offsets);
    T *out = sums.mutable_data_ptr<T>(), *weight = weights.mutable_data_ptr<T>();
    T *depth = depths.mutable_data_ptr<T>(), *opacity = opacities.mutable_data_ptr<T>();
    for_each(offsets.rays, [=] __device__(int64_t i) {
      const auto ray = scene.ray(i);
      T left, *w = weight + scene.begin(i), *seen = out + i * scene.channels;
      const int64_t n = ray_weights(ray, scene.threshold, w, left);
      ray_sums(ray, w, n, seen, depth[i], opacity[i]);
      if (scene.background != nullptr)
        for (int64_t c = 0; c < scene.channels; ++c) seen[c] = fma(left, scene.behind(i)[c], seen[c]);
    });
  });
  return {sums, depths, opacities, weights};
}

inline Five backward(const at::Tensor& grad_features, const at::Tensor& grad_depth, const at::Tensor& grad_opacity,
                     const at::Tensor& grad_weights, const at::Tensor& density, const at::Tensor& delta,
                     const at::Tensor& features, const at::Tensor& t, const std::optional<at::Tensor>& background,
                     double threshold, const c10::List<bool>& needed, const RayOffsets& offsets) {
  const c10::cuda::CUDAGuard guard(density.device());
  const auto like = [&](const at::Tensor& x, bool wanted) {
    return wanted ? at::empty_like(x) : at::empty({0}, x.options());
  };
  at::Tensor to_density = like(density, needed[0]), to_delta = like(delta, needed[1]);
  at::Tensor to_features = like(features, needed[2]), to_t = like(t, needed[3]);
  at::Tensor to_background = background ? like(*background, needed[4]) : at::empty({0}, density.options());
  const bool shared = background && needed[4] && background->dim() == 1;
  at::Tensor lefts = at::empty({shared ? offsets.rays : 0}, density.options());
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite_backward", [&] {
    using T = scalar_t;
    const auto pointer = [](const at::Tensor& x, bool wanted) { return wanted ? x.mutable_data_ptr<T>() : nullptr; };
    const auto scene = make_scene<T>(density, delta, features, t, background, threshold, offsets);
    const T *of_features = grad_features.const_data_ptr<T>(), *of_weights = grad_weights.const_data_ptr<T>();
    const T *of_depth = grad_depth.const_data_ptr<T>(), *of_opacity = grad_opacity.const_data_ptr<T>();
    T *density_out = pointer(to_density, needed[0]), *delta_out = pointer(to_delta, needed[1]);
    T *features_out = pointer(to_features, needed[2]), *t_out = pointer(to_t, needed[3]);
    T *behind_out = pointer(to_background, background && needed[4] && !shared), *left_out = pointer(lefts, shared);
    for_each(offsets.rays, [=] __device__(int64_t i) {
      const int64_t begin = scene.begin(i), channels = scene.channels;
      RayGradients<T> up{of_features + i * channels, of_weights + begin, of_depth[i], of_opacity[i], T(0)};
      if (scene.background != nullptr)
        for (int64_t c = 0; c < channels; ++c) up.left = fma(up.features[c], scene.behind(i)[c], up.left);
      const SampleGradients<T> out{density_out != nullptr ? density_out + begin : nullptr,
                                   delta_out != nullptr ? delta_out + begin : nullptr,
                                   features_out != nullptr ? features_out + begin * channels : nullptr,
                                   t_out != nullptr ? t_out + begin : nullptr};
      const T left = ray_backward(scene.ray(i), scene.threshold, up, out);
      if (left_out != nullptr) left_out[i] = left;
      if (behind_out != nullptr)
        for (int64_t c = 0; c < channels; ++c) behind_out[i * channels + c] = left * up.features[c];
    });
  });
  if (shared) to_background = at::mv(grad_features.t(), lefts);
  return {to_density, to_delta, to_features, to_t, to_background};
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("composite", &composite<&forward>);
  m.impl("composite_backward", &composite_backward<&backward>);
  m.impl("composite_packed", &composite_packed<&forward>);
  m.impl("composite_packed_backward", &composite_packed_backward<&backward>);
}

}  // namespace gan3d::composite_cuda
