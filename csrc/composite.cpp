#include "composite.h"

#include <vector>

#include "composite_checks.h"
#include "cpu.h"

namespace gan3d {
namespace {

// run(std::integral_constant<int, C>) with the number of channels known to the compiler where that pays.
template <class F>
void with_channels(int64_t c, const F& run) {
  switch (c) {
    case 1: return run(std::integral_constant<int, 1>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 13: return run(std::integral_constant<int, 13>());
    case 32: return run(std::integral_constant<int, 32>());
    default: return run(std::integral_constant<int, 0>());
  }
}

// Rays per task: so many that a task is worth a thread's while.
int64_t rays_per_task(int64_t rays, int64_t samples) { return max<int64_t>(1, rays * 8192 / max<int64_t>(samples, 1)); }

template <class T>
const T* pointer(const std::optional<at::Tensor>& x) { return x ? x->const_data_ptr<T>() : nullptr; }

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// begin(r), end(r): where ray r's samples lie.
template <class Begin>
Outputs forward(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
                const std::optional<at::Tensor>& background, double threshold, int64_t rays, const Begin& begin) {
  const int64_t c = features.size(-1);
  at::Tensor feature = at::empty({rays, c}, density.options()), depth = at::empty({rays}, density.options()),
             opacity = at::empty({rays}, density.options()), weights = at::empty_like(density);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite", [&] {
    const auto *sigma = density.const_data_ptr<scalar_t>(), *length = delta.const_data_ptr<scalar_t>(),
               *f = features.const_data_ptr<scalar_t>(), *where = t.const_data_ptr<scalar_t>(),
               *behind = pointer<scalar_t>(background);
    auto *out = feature.mutable_data_ptr<scalar_t>(), *d = depth.mutable_data_ptr<scalar_t>(),
         *o = opacity.mutable_data_ptr<scalar_t>(), *w = weights.mutable_data_ptr<scalar_t>();
    with_channels(c, [&](auto known) {
      parallel(rays, rays_per_task(rays, density.numel()), [=](int64_t r) {
        const int64_t a = begin(r), s = begin(r + 1) - a;
        composite_ray<decltype(known)::value>(s, c, sigma + a, length + a, f + a * c, where + a,
                                              behind ? behind + r * c : nullptr, scalar_t(threshold), out + r * c, d + r,
                                              o + r, w + a);
      });
    });
  });
  return {feature, depth, opacity, weights};
}

template <class Begin>
Gradients backward(const at::Tensor& g_feature, const at::Tensor& g_depth, const at::Tensor& g_opacity,
                   const at::Tensor& g_weights, const at::Tensor& density, const at::Tensor& delta,
                   const at::Tensor& features, const at::Tensor& t, const std::optional<at::Tensor>& background,
                   double threshold, const c10::List<bool>& needed, int64_t rays, const Begin& begin) {
  const int64_t c = features.size(-1);
  const at::Tensor none = at::empty({0}, density.options());
  auto like = [&](bool wanted, const at::Tensor& x) { return wanted ? at::empty_like(x) : none; };
  at::Tensor d_density = like(needed[0], density), d_delta = like(needed[1], delta),
             d_features = like(needed[2], features), d_t = like(needed[3], t),
             d_background = needed[4] && background ? at::empty_like(*background) : none;
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite_backward", [&] {
    const auto *sigma = density.const_data_ptr<scalar_t>(), *length = delta.const_data_ptr<scalar_t>(),
               *f = features.const_data_ptr<scalar_t>(), *where = t.const_data_ptr<scalar_t>(),
               *behind = pointer<scalar_t>(background), *gf = g_feature.const_data_ptr<scalar_t>(),
               *gd = g_depth.const_data_ptr<scalar_t>(), *go = g_opacity.const_data_ptr<scalar_t>(),
               *gw = g_weights.const_data_ptr<scalar_t>();
    auto wanted = [](const at::Tensor& x, const at::Tensor& empty) {
      return x.is_same(empty) ? nullptr : x.mutable_data_ptr<scalar_t>();
    };
    auto *ds = wanted(d_density, none), *dl = wanted(d_delta, none), *df = wanted(d_features, none),
         *dt = wanted(d_t, none), *db = wanted(d_background, none);
    with_channels(c, [&](auto known) {
      at::parallel_for(0, rays, rays_per_task(rays, density.numel()), [&](int64_t first, int64_t last) {
        std::vector<scalar_t> work;  // three numbers a sample, of one ray at a time
        for (int64_t r = first; r < last; ++r) {
          const int64_t a = begin(r), s = begin(r + 1) - a;
          if (int64_t(work.size()) < 3 * s) work.resize(3 * s);
          scalar_t* space = work.data();
          composite_ray_backward<decltype(known)::value>(
              s, c, sigma + a, length + a, f + a * c, where + a, behind ? behind + r * c : nullptr, scalar_t(threshold),
              gf + r * c, gd[r], go[r], gw + a, space, space + s, space + 2 * s, ds ? ds + a : nullptr,
              dl ? dl + a : nullptr, df ? df + a * c : nullptr, dt ? dt + a : nullptr, db ? db + r * c : nullptr);
        }
      });
    });
  });
  return {d_density, d_delta, d_features, d_t, d_background};
}

Outputs composite(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
                  const std::optional<at::Tensor>& background, double threshold) {
  check_dense("composite", density, delta, features, t, background);
  const int64_t s = density.size(1);
  return forward(density, delta, features, t, background, threshold, density.size(0), [s](int64_t r) { return r * s; });
}

Gradients composite_backward(const at::Tensor& g_feature, const at::Tensor& g_depth, const at::Tensor& g_opacity,
                             const at::Tensor& g_weights, const at::Tensor& density, const at::Tensor& delta,
                             const at::Tensor& features, const at::Tensor& t,
                             const std::optional<at::Tensor>& background, double threshold, const c10::List<bool>& needed) {
  check_dense("composite_backward", density, delta, features, t, background);
  check_gradients("composite_backward", g_feature, g_depth, g_opacity, g_weights, density, features, density.size(0));
  const int64_t s = density.size(1);
  return backward(g_feature, g_depth, g_opacity, g_weights, density, delta, features, t, background, threshold, needed,
                  density.size(0), [s](int64_t r) { return r * s; });
}

Outputs composite_packed(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features,
                         const at::Tensor& t, const at::Tensor& offsets, const std::optional<at::Tensor>& background,
                         double threshold) {
  check_packed("composite_packed", density, delta, features, t, offsets, background);
  const int64_t* begin = offsets.const_data_ptr<int64_t>();
  check_offsets("composite_packed", begin, offsets.size(0) - 1, density.size(0));
  return forward(density, delta, features, t, background, threshold, offsets.size(0) - 1,
                 [begin](int64_t r) { return begin[r]; });
}

Gradients composite_packed_backward(const at::Tensor& g_feature, const at::Tensor& g_depth, const at::Tensor& g_opacity,
                                    const at::Tensor& g_weights, const at::Tensor& density, const at::Tensor& delta,
                                    const at::Tensor& features, const at::Tensor& t, const at::Tensor& offsets,
                                    const std::optional<at::Tensor>& background, double threshold,
                                    const c10::List<bool>& needed) {
  check_packed("composite_packed_backward", density, delta, features, t, offsets, background);
  const int64_t rays = offsets.size(0) - 1;
  check_gradients("composite_packed_backward", g_feature, g_depth, g_opacity, g_weights, density, features, rays);
  const int64_t* begin = offsets.const_data_ptr<int64_t>();
  check_offsets("composite_packed_backward", begin, rays, density.size(0));
  return backward(g_feature, g_depth, g_opacity, g_weights, density, delta, features, t, background, threshold, needed,
                  rays, [begin](int64_t r) { return begin[r]; });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def(
      "composite(Tensor density, Tensor delta, Tensor features, Tensor t, Tensor? background, float threshold) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "composite_backward(Tensor g_feature, Tensor g_depth, Tensor g_opacity, Tensor g_weights, Tensor density, "
      "Tensor delta, Tensor features, Tensor t, Tensor? background, float threshold, bool[] needed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "composite_packed(Tensor density, Tensor delta, Tensor features, Tensor t, Tensor offsets, Tensor? background, "
      "float threshold) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "composite_packed_backward(Tensor g_feature, Tensor g_depth, Tensor g_opacity, Tensor g_weights, Tensor density, "
      "Tensor delta, Tensor features, Tensor t, Tensor offsets, Tensor? background, float threshold, bool[] needed) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("composite", &composite);
  m.impl("composite_backward", &composite_backward);
  m.impl("composite_packed", &composite_packed);
  m.impl("composite_packed_backward", &composite_packed_backward);
}

}  // namespace gan3d
