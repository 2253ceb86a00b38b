#pragma once

#include "composite.h"
#include "composite_checks.h"
#include "cuda.cuh"

namespace gan3d::composite_cuda {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Where a ray's samples lie: from the offsets, or every `samples` if there are none. Offsets are not checked here, since
// that would wait for the GPU; the public function says what they must be.
struct Begin {
  const int64_t* offsets;
  int64_t samples;
  HD int64_t operator()(int64_t r) const { return offsets == nullptr ? r * samples : offsets[r]; }
};

inline Outputs forward(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                       const at::Tensor& t, const std::optional<at::Tensor>& background, double threshold, int64_t rays,
                       Begin begin) {
  const c10::cuda::CUDAGuard guard(density.device());
  const int64_t c = features.size(-1);
  at::Tensor feature = at::empty({rays, c}, density.options()), depth = at::empty({rays}, density.options()),
             opacity = at::empty({rays}, density.options()), weights = at::empty_like(density);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite", [&] {
    const scalar_t *sigma = density.const_data_ptr<scalar_t>(), *length = delta.const_data_ptr<scalar_t>(),
                   *f = features.const_data_ptr<scalar_t>(), *where = t.const_data_ptr<scalar_t>(),
                   *behind = background ? background->const_data_ptr<scalar_t>() : nullptr;
    scalar_t *out = feature.mutable_data_ptr<scalar_t>(), *d = depth.mutable_data_ptr<scalar_t>(),
             *o = opacity.mutable_data_ptr<scalar_t>(), *w = weights.mutable_data_ptr<scalar_t>();
    const scalar_t least = scalar_t(threshold);
    for_each(rays, [=] __device__(int64_t r) {
      const int64_t a = begin(r);
      composite_ray<0>(begin(r + 1) - a, c, sigma + a, length + a, f + a * c, where + a,
                       behind != nullptr ? behind + r * c : nullptr, least, out + r * c, d + r, o + r, w + a);
    });
  });
  return {feature, depth, opacity, weights};
}

inline Gradients backward(const at::Tensor& g_feature, const at::Tensor& g_depth, const at::Tensor& g_opacity,
                          const at::Tensor& g_weights, const at::Tensor& density, const at::Tensor& delta,
                          const at::Tensor& features, const at::Tensor& t, const std::optional<at::Tensor>& background,
                          double threshold, const c10::List<bool>& needed, int64_t rays, Begin begin) {
  const c10::cuda::CUDAGuard guard(density.device());
  const int64_t c = features.size(-1);
  const at::Tensor none = at::empty({0}, density.options());
  at::Tensor d_density = needed[0] ? at::empty_like(density) : none, d_delta = needed[1] ? at::empty_like(delta) : none,
             d_features = needed[2] ? at::empty_like(features) : none, d_t = needed[3] ? at::empty_like(t) : none,
             d_background = needed[4] && background ? at::empty_like(*background) : none;
  const at::Tensor work = at::empty({3, density.numel()}, density.options());
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite_backward", [&] {
    const scalar_t *sigma = density.const_data_ptr<scalar_t>(), *length = delta.const_data_ptr<scalar_t>(),
                   *f = features.const_data_ptr<scalar_t>(), *where = t.const_data_ptr<scalar_t>(),
                   *behind = background ? background->const_data_ptr<scalar_t>() : nullptr,
                   *gf = g_feature.const_data_ptr<scalar_t>(), *gd = g_depth.const_data_ptr<scalar_t>(),
                   *go = g_opacity.const_data_ptr<scalar_t>(), *gw = g_weights.const_data_ptr<scalar_t>();
    const bool want[5] = {needed[0], needed[1], needed[2], needed[3], needed[4] && background.has_value()};
    scalar_t *ds = want[0] ? d_density.mutable_data_ptr<scalar_t>() : nullptr,
             *dl = want[1] ? d_delta.mutable_data_ptr<scalar_t>() : nullptr,
             *df = want[2] ? d_features.mutable_data_ptr<scalar_t>() : nullptr,
             *dt = want[3] ? d_t.mutable_data_ptr<scalar_t>() : nullptr,
             *db = want[4] ? d_background.mutable_data_ptr<scalar_t>() : nullptr,
             *space = work.mutable_data_ptr<scalar_t>();
    const scalar_t least = scalar_t(threshold);
    const int64_t n = density.numel();
    for_each(rays, [=] __device__(int64_t r) {
      const int64_t a = begin(r);
      composite_ray_backward<0>(begin(r + 1) - a, c, sigma + a, length + a, f + a * c, where + a,
                                behind != nullptr ? behind + r * c : nullptr, least, gf + r * c, gd[r], go[r], gw + a,
                                space + a, space + n + a, space + 2 * n + a, ds != nullptr ? ds + a : nullptr,
                                dl != nullptr ? dl + a : nullptr, df != nullptr ? df + a * c : nullptr,
                                dt != nullptr ? dt + a : nullptr, db != nullptr ? db + r * c : nullptr);
    });
  });
  return {d_density, d_delta, d_features, d_t, d_background};
}

inline Outputs composite(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                         const at::Tensor& t, const std::optional<at::Tensor>& background, double threshold) {
  check_dense("composite", density, delta, features, t, background);
  return forward(density, delta, features, t, background, threshold, density.size(0), {nullptr, density.size(1)});
}

inline Gradients composite_backward(const at::Tensor& g_feature, const at::Tensor& g_depth, const at::Tensor& g_opacity,
                                    const at::Tensor& g_weights, const at::Tensor& density, const at::Tensor& delta,
                                    const at::Tensor& features, const at::Tensor& t,
                                    const std::optional<at::Tensor>& background, double threshold,
                                    const c10::List<bool>& needed) {
  check_dense("composite_backward", density, delta, features, t, background);
  check_gradients("composite_backward", g_feature, g_depth, g_opacity, g_weights, density, features, density.size(0));
  return backward(g_feature, g_depth, g_opacity, g_weights, density, delta, features, t, background, threshold, needed,
                  density.size(0), {nullptr, density.size(1)});
}

inline Outputs composite_packed(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                                const at::Tensor& t, const at::Tensor& offsets,
                                const std::optional<at::Tensor>& background, double threshold) {
  check_packed("composite_packed", density, delta, features, t, offsets, background);
  return forward(density, delta, features, t, background, threshold, offsets.size(0) - 1,
                 {offsets.const_data_ptr<int64_t>(), 0});
}

inline Gradients composite_packed_backward(const at::Tensor& g_feature, const at::Tensor& g_depth,
                                           const at::Tensor& g_opacity, const at::Tensor& g_weights,
                                           const at::Tensor& density, const at::Tensor& delta,
                                           const at::Tensor& features, const at::Tensor& t, const at::Tensor& offsets,
                                           const std::optional<at::Tensor>& background, double threshold,
                                           const c10::List<bool>& needed) {
  check_packed("composite_packed_backward", density, delta, features, t, offsets, background);
  const int64_t rays = offsets.size(0) - 1;
  check_gradients("composite_packed_backward", g_feature, g_depth, g_opacity, g_weights, density, features, rays);
  return backward(g_feature, g_depth, g_opacity, g_weights, density, delta, features, t, background, threshold, needed,
                  rays, {offsets.const_data_ptr<int64_t>(), 0});
}

TORCH_LIBRARY_IMPL(gan3d, CUDA, m) {
  m.impl("composite", &composite);
  m.impl("composite_backward", &composite_backward);
  m.impl("composite_packed", &composite_packed);
  m.impl("composite_packed_backward", &composite_packed_backward);
}

}  // namespace gan3d::composite_cuda
