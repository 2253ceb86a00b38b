#include "composite.h"

#include <ATen/ops/sum.h>

#include <algorithm>
#include <memory>

#include "composite_checks.h"
#include "cpu.h"
#include "lanes.h"

namespace gan3d {
namespace {

constexpr int64_t kGroup = 1024;  // rays and samples taken together, while what is known of them stays in the cache
constexpr int64_t kLong = 4096;   // longer rays are taken sample by sample, by the functions of composite.h

// out[k] = sum over samples of w·f[k], k < G, in four partial sums.
template <class T, int G>
HD void sum_lanes(const T* w, const T* f, int64_t stride, int64_t n, T* out) {
  using V = typename LanesOf<T, G>::type;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += w[i + k] * load<V>(f + (i + k) * stride);
  for (; i < n; ++i) sum[0] += w[i] * load<V>(f + i * stride);
  const V total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  store(out, total);
}
template <class T, int C>
HD void sum_few(const T* w, const T* f, int64_t stride, int64_t n, T* out) {
  T sum[4][C] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k)
      for (int c = 0; c < C; ++c) sum[k][c] = fma(w[i + k], f[(i + k) * stride + c], sum[k][c]);
  for (; i < n; ++i)
    for (int c = 0; c < C; ++c) sum[0][c] = fma(w[i], f[i * stride + c], sum[0][c]);
  for (int c = 0; c < C; ++c) out[c] = (sum[0][c] + sum[1][c]) + (sum[2][c] + sum[3][c]);
}

template <class T>
void sum_features(const T* w, const T* f, int64_t channels, int64_t n, T* out) {
  if (channels == 3) return sum_few<T, 3>(w, f, 3, n, out);
  if (channels == 4) return sum_lanes<T, 4>(w, f, 4, n, out);
  constexpr int widest = 64 / sizeof(T);
  int64_t c = 0;
  for (; c + widest <= channels; c += widest) sum_lanes<T, widest>(w, f + c, channels, n, out + c);
  for (; c + 4 <= channels; c += 4) sum_lanes<T, 4>(w, f + c, channels, n, out + c);
  switch (channels - c) {
    case 1: return sum_few<T, 1>(w, f + c, channels, n, out + c);
    case 2: return sum_few<T, 2>(w, f + c, channels, n, out + c);
    case 3: return sum_few<T, 3>(w, f + c, channels, n, out + c);
  }
}

// q[i] += g·f[i] and out[i] = w[i]·g for the samples of a ray; out may be null.
template <class T, int C>
HD void pull_few(const T* w, const T* f, const T* g, int64_t n, T* q, T* out) {
  T gradient[C];
  for (int c = 0; c < C; ++c) gradient[c] = g[c];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T dot = q[i];
    for (int c = 0; c < C; ++c) dot = fma(gradient[c], f[C * i + c], dot);
    q[i] = dot;
  }
  if (out == nullptr) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    for (int c = 0; c < C; ++c) out[C * i + c] = w[i] * gradient[c];
}

template <class T>
void pull_features(const T* w, const T* f, const T* g, int64_t channels, int64_t n, T* q, T* out) {
  switch (channels) {
    case 1: return pull_few<T, 1>(w, f, g, n, q, out);
    case 2: return pull_few<T, 2>(w, f, g, n, q, out);
    case 3: return pull_few<T, 3>(w, f, g, n, q, out);
    case 4: return pull_few<T, 4>(w, f, g, n, q, out);
  }
  for (int64_t i = 0; i < n; ++i, f += channels) {
    T dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < channels; ++c) dot = fma(g[c], f[c], dot);
    q[i] += dot;
    if (out == nullptr) continue;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) out[i * channels + c] = w[i] * g[c];
  }
}

// What is known of the samples of a group of rays.
template <class T>
struct Group {
  static constexpr int64_t most = kGroup + kLong;
  std::unique_ptr<double[]> sum{new double[most]}, total{new double[kGroup]};
  std::unique_ptr<T[]> arriving{new T[most + 1]}, weight{new T[most]}, pull{new T[most]}, left{new T[kGroup]};

  // For the rays from `first` to before `last`: the light arriving at each sample and left behind each ray, and the
  // weights. All but the sums runs across the rays, so that short ones cost no more than long ones.
  void absorb(const Scene<T>& scene, int64_t first, int64_t last, T* w) {
    const int64_t begin = scene.offsets[first], n = scene.offsets[last] - begin;
    const T *density = scene.density + begin, *delta = scene.delta + begin;
    double *s = sum.get(), *all = total.get();
    T *light = arriving.get(), *end = left.get();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T x = density[i] * delta[i];
      s[i] = x;
      w[i] = one_minus_exp(x);
    }
    for (int64_t ray = first; ray < last; ++ray) {
      double before = 0;
      const int64_t stop = scene.offsets[ray + 1] - begin;
      for (int64_t i = scene.offsets[ray] - begin; i < stop; ++i) {
        const double x = s[i];
        s[i] = before;
        before += x;
      }
      all[ray - first] = before;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      light[i] = light_behind<T>(s[i]);
      w[i] *= light[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < last - first; ++i) end[i] = light_behind<T>(all[i]);
  }

  // How many of a ray's samples, from `begin` of the group on, are processed; the weights of the others become 0 and
  // `left` the light behind the last that is.
  int64_t stop(int64_t begin, int64_t count, T threshold, T* w, T& left) const {
    if (!(threshold > 0)) return count;
    const T* light = arriving.get() + begin;
    int64_t n = 0;
    while (n < count && !(light[n] < threshold)) ++n;
    if (n < count) left = light[n];
    std::fill(w + n, w + count, T(0));
    return n;
  }
};

inline int64_t count_groups(const RayOffsets& offsets) {
  return (offsets.samples + offsets.rays + kGroup - 1) / kGroup;
}

// f(g, group, first, last) for groups of neighbouring rays, about kGroup rays and samples each whatever the number of
// threads. Only the last ray of a group may reach beyond them.
template <class T, class F>
void for_each_group(const RayOffsets& offsets, const F& f) {
  const auto first_ray = [&](int64_t key) {  // ray i begins at offsets[i] + i, counting rays and samples
    int64_t low = 0, high = offsets.rays;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] + middle < key) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  at::parallel_for(0, count_groups(offsets), 4, [&](int64_t from, int64_t to) {
    Group<T> group;
    int64_t first = first_ray(from * kGroup);
    for (int64_t g = from; g < to; ++g) {
      const int64_t last = first_ray((g + 1) * kGroup);
      f(g, group, first, last);
      first = last;
    }
  });
}

// The last ray of a group, if it is too long for the group.
inline bool ends_long(const RayOffsets& offsets, int64_t first, int64_t last) {
  return first < last && offsets[last] - offsets[last - 1] > kLong;
}


template <class T>
struct Forward {
  Scene<T> scene;
  T *features, *depth, *opacity, *weights;

  void put_behind(int64_t i, T left) const {
    if (scene.background == nullptr) return;
    const T* behind = scene.behind(i);
    T* out = features + i * scene.channels;
    for (int64_t c = 0; c < scene.channels; ++c) out[c] = fma(left, behind[c], out[c]);
  }

  void long_ray(int64_t i) const {
    const auto ray = scene.ray(i);
    T left, *w = weights + scene.offsets[i];
    const int64_t n = ray_weights(ray, scene.threshold, w, left);
    ray_sums(ray, w, n, features + i * scene.channels, depth[i], opacity[i]);
    put_behind(i, left);
  }

  void rays(Group<T>& group, int64_t first, int64_t last) const {
    group.absorb(scene, first, last, weights + scene.offsets[first]);
    for (int64_t i = first; i < last; ++i) {
      const auto ray = scene.ray(i);
      const int64_t at = scene.offsets[i] - scene.offsets[first];
      T left = group.left[i - first], *w = weights + scene.offsets[i], sum_t = 0, sum = 0;
      const int64_t n = group.stop(at, ray.count, scene.threshold, w, left);
#pragma omp simd reduction(+ : sum_t, sum)
      for (int64_t j = 0; j < n; ++j) sum_t = fma(w[j], ray.t[j], sum_t), sum += w[j];
      depth[i] = sum_t, opacity[i] = sum;
      sum_features(w, ray.features, scene.channels, n, features + i * scene.channels);
      put_behind(i, left);
    }
  }
};

template <class T>
struct Backward {
  Scene<T> scene;
  const T *of_features, *of_depth, *of_opacity, *of_weights;
  SampleGradients<T> to;
  T *background, *parts;  // gradient of each ray's background, or each group's part of that of the only one; or null

  RayGradients<T> gradients(int64_t i) const {
    const T* up = of_features + i * scene.channels;
    T left = 0;
    if (scene.background != nullptr)
      for (int64_t c = 0; c < scene.channels; ++c) left = fma(up[c], scene.behind(i)[c], left);
    return {up, of_weights + scene.offsets[i], of_depth[i], of_opacity[i], left};
  }
  SampleGradients<T> outlets(int64_t i) const {
    const auto at = [](T* p, int64_t where) { return p != nullptr ? p + where : nullptr; };
    const int64_t begin = scene.offsets[i];
    return {at(to.density, begin), at(to.delta, begin), at(to.features, begin * scene.channels), at(to.t, begin)};
  }
  void pull_background(int64_t g, int64_t i, T left) const {
    const T* up = of_features + i * scene.channels;
    if (background != nullptr)
      for (int64_t c = 0; c < scene.channels; ++c) background[i * scene.channels + c] = left * up[c];
    if (parts != nullptr)
      for (int64_t c = 0; c < scene.channels; ++c)
        parts[g * scene.channels + c] = fma(left, up[c], parts[g * scene.channels + c]);
  }

  void long_ray(int64_t g, int64_t i) const {
    pull_background(g, i, ray_backward(scene.ray(i), scene.threshold, gradients(i), outlets(i)));
  }

  void rays(int64_t g, Group<T>& group, int64_t first, int64_t last) const {
    group.absorb(scene, first, last, group.weight.get());
    for (int64_t i = first; i < last; ++i) {
      const auto ray = scene.ray(i);
      const auto up = gradients(i);
      const auto out = outlets(i);
      const int64_t at = scene.offsets[i] - scene.offsets[first], count = ray.count;
      T left = group.left[i - first], *w = group.weight.get() + at, *q = group.pull.get() + at;
      const int64_t n = group.stop(at, count, scene.threshold, w, left);
      pull_background(g, i, left);
      if (out.t != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) out.t[j] = w[j] * up.depth;
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) q[j] = up.weights[j] + fma(up.depth, ray.t[j], up.opacity);
      pull_features(w, ray.features, up.features, scene.channels, n, q, out.features);
      if (out.features != nullptr)
        std::fill(out.features + n * scene.channels, out.features + count * scene.channels, T(0));
      if (out.density == nullptr && out.delta == nullptr) continue;
      thickness(w, n, double(left) * up.left, group.sum.get() + at, q);
      T* light = group.arriving.get() + at;
      const T next = light[n];  // of another ray, if this one does not end early
      light[n] = left;          // the light behind sample j is what arrives at j + 1
      if (out.density != nullptr) scale(ray.delta, light + 1, q, group.sum.get() + at, n, count, out.density);
      if (out.delta != nullptr) scale(ray.density, light + 1, q, group.sum.get() + at, n, count, out.delta);
      light[n] = next;
    }
  }
  // s[j] = `behind` + sum of w·q over the samples behind j.
  static void thickness(const T* w, int64_t n, double behind, double* s, const T* q) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) s[j] = w[j] * q[j];
    for (int64_t j = n - 1; j >= 0; --j) {
      const double part = s[j];
      s[j] = behind;
      behind += part;
    }
  }
  static void scale(const T* by, const T* light, const T* q, const double* s, int64_t n, int64_t count, T* out) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) out[j] = by[j] * (light[j] * q[j] - T(s[j]));
    std::fill(out + n, out + count, T(0));
  }
};

Four forward(const at::Tensor& density, const at::Tensor& delta, const at::Tensor& features, const at::Tensor& t,
             const std::optional<at::Tensor>& background, double threshold, const RayOffsets& offsets) {
  at::Tensor sums = at::empty({offsets.rays, features.size(-1)}, density.options());
  at::Tensor weights = fresh(density.sizes(), density.options());
  at::Tensor depth = at::empty({offsets.rays}, density.options()), opacity = at::empty_like(depth);
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite", [&] {
    using T = scalar_t;
    const Forward<T> all{make_scene<T>(density, delta, features, t, background, threshold, offsets),
                         sums.mutable_data_ptr<T>(), depth.mutable_data_ptr<T>(), opacity.mutable_data_ptr<T>(),
                         weights.mutable_data_ptr<T>()};
    for_each_group<T>(offsets, [&](int64_t, Group<T>& group, int64_t first, int64_t last) {
      if (ends_long(offsets, first, last)) all.long_ray(--last);
      all.rays(group, first, last);
    });
  });
  return {sums, depth, opacity, weights};
}

Five backward(const at::Tensor& grad_features, const at::Tensor& grad_depth, const at::Tensor& grad_opacity,
              const at::Tensor& grad_weights, const at::Tensor& density, const at::Tensor& delta,
              const at::Tensor& features, const at::Tensor& t, const std::optional<at::Tensor>& background,
              double threshold, const c10::List<bool>& needed, const RayOffsets& offsets) {
  const int64_t channels = features.size(-1);
  const auto like = [&](const at::Tensor& x, bool wanted) {
    return wanted ? fresh(x.sizes(), x.options()) : at::empty({0}, x.options());
  };
  at::Tensor to_density = like(density, needed[0]), to_delta = like(delta, needed[1]);
  at::Tensor to_features = like(features, needed[2]), to_t = like(t, needed[3]);
  at::Tensor to_background = background ? like(*background, needed[4]) : at::empty({0}, density.options());
  // one colour for all rays: each group sums its own, so that the number of threads does not matter
  const bool shared = background && needed[4] && background->dim() == 1;
  at::Tensor parts = at::zeros({shared ? count_groups(offsets) : 0, channels}, density.options());
  AT_DISPATCH_FLOATING_TYPES(density.scalar_type(), "composite_backward", [&] {
    using T = scalar_t;
    const auto pointer = [](const at::Tensor& x, bool wanted) { return wanted ? x.mutable_data_ptr<T>() : nullptr; };
    const Backward<T> all{make_scene<T>(density, delta, features, t, background, threshold, offsets),
                          grad_features.const_data_ptr<T>(), grad_depth.const_data_ptr<T>(),
                          grad_opacity.const_data_ptr<T>(), grad_weights.const_data_ptr<T>(),
                          {pointer(to_density, needed[0]), pointer(to_delta, needed[1]),
                           pointer(to_features, needed[2]), pointer(to_t, needed[3])},
                          pointer(to_background, background && needed[4] && !shared), pointer(parts, shared)};
    for_each_group<T>(offsets, [&](int64_t g, Group<T>& group, int64_t first, int64_t last) {
      if (ends_long(offsets, first, last)) all.long_ray(g, --last);
      all.rays(g, group, first, last);
    });
  });
  if (shared) to_background = at::sum(parts, 0);
  return {to_density, to_delta, to_features, to_t, to_background};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(gan3d, m) {
  m.def("composite(Tensor density, Tensor delta, Tensor features, Tensor t, Tensor? background, float threshold) -> "
        "(Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_backward(Tensor grad_features, Tensor grad_depth, Tensor grad_opacity, Tensor grad_weights, "
        "Tensor density, Tensor delta, Tensor features, Tensor t, Tensor? background, float threshold, bool[] needed) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_packed(Tensor density, Tensor delta, Tensor features, Tensor t, Tensor offsets, Tensor? background, "
        "float threshold) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("composite_packed_backward(Tensor grad_features, Tensor grad_depth, Tensor grad_opacity, Tensor grad_weights, "
        "Tensor density, Tensor delta, Tensor features, Tensor t, Tensor offsets, Tensor? background, float threshold, "
        "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(gan3d, CPU, m) {
  m.impl("composite", &composite<&forward>);
  m.impl("composite_backward", &composite_backward<&backward>);
  m.impl("composite_packed", &composite_packed<&forward>);
  m.impl("composite_packed_backward", &composite_packed_backward<&backward>);
}

}  // namespace gan3d
