// Emission and absorption along one ray, front to back: weights, what they sum, and the gradient in one reverse sweep.
//
// A sample of thickness x = density·delta lets e^−x of the light through. The light that arrives at a sample is
// e^−(sum of the thicknesses before it); the sum is a double, so that rays of millions of samples stay right.
#pragma once

#include "common.h"

namespace gan3d {

// What is left of the light behind this thickness.
template <class T>
HD T light_behind(double thickness) { return exp(-T(thickness)); }

// The samples of one ray.
template <class T>
struct RaySamples {
  const T *density, *delta, *features, *t;
  int64_t count, channels;
};

// Weights; those of samples that less than `threshold` of the light reaches are 0. Returns how many samples were
// processed; `left` is the light behind the last of them.
template <class T>
HD int64_t ray_weights(const RaySamples<T>& ray, T threshold, T* weights, T& left) {
  double thickness = 0;
  left = T(1);
  int64_t i = 0;
  for (; i < ray.count && !(left < threshold); ++i) {
    const T x = ray.density[i] * ray.delta[i];
    weights[i] = left * one_minus_exp(x);
    thickness += x;
    left = light_behind<T>(thickness);
  }
  for (int64_t j = i; j < ray.count; ++j) weights[j] = 0;
  return i;
}

// Weighted sums over the first `processed` samples.
template <class T>
HD void ray_sums(const RaySamples<T>& ray, const T* weights, int64_t processed, T* features, T& depth, T& opacity) {
  double sum_t = 0, sum = 0;
  for (int64_t i = 0; i < processed; ++i) sum_t += double(weights[i]) * ray.t[i], sum += weights[i];
  depth = T(sum_t), opacity = T(sum);
  constexpr int group = 4;  // channels summed at once, in registers
  for (int64_t first = 0; first < ray.channels; first += group) {
    const int lanes = int(min<int64_t>(group, ray.channels - first));
    double total[group] = {};
    for (int64_t i = 0; i < processed; ++i)
      for (int k = 0; k < lanes; ++k) total[k] += double(weights[i]) * ray.features[i * ray.channels + first + k];
    for (int k = 0; k < lanes; ++k) features[first + k] = T(total[k]);
  }
}

// Gradients of what a ray returned; `left`: of the light that is left.
template <class T>
struct RayGradients {
  const T *features, *weights;
  T depth, opacity, left;
};

// Where the gradients of the samples go; null: nobody asks.
template <class T>
struct SampleGradients {
  T *density, *delta, *features, *t;
};

// With q the gradient of a sample's weight through everything, and S = sum of w·q over the samples behind it, the
// gradient of its thickness is (light behind it)·q − S − left·(gradient of left). Returns `left`.
template <class T>
HD T ray_backward(const RaySamples<T>& ray, T threshold, const RayGradients<T>& up, const SampleGradients<T>& out) {
  T* arriving = out.density != nullptr ? out.density : out.delta;  // kept where the gradients will be
  double thickness = 0;
  T left = T(1);
  int64_t n = 0;
  for (; n < ray.count && !(left < threshold); ++n) {
    const T x = ray.density[n] * ray.delta[n], w = left * one_minus_exp(x);
    if (arriving != nullptr) arriving[n] = left;
    if (out.t != nullptr) out.t[n] = w * up.depth;
    if (out.features != nullptr)
      for (int64_t c = 0; c < ray.channels; ++c) out.features[n * ray.channels + c] = w * up.features[c];
    thickness += x;
    left = light_behind<T>(thickness);
  }
  for (int64_t i = n; i < ray.count; ++i) {
    if (out.density != nullptr) out.density[i] = 0;
    if (out.delta != nullptr) out.delta[i] = 0;
    if (out.t != nullptr) out.t[i] = 0;
    if (out.features != nullptr)
      for (int64_t c = 0; c < ray.channels; ++c) out.features[i * ray.channels + c] = 0;
  }
  if (arriving == nullptr) return left;
  double behind = double(left) * up.left;
  T next = left;
  for (int64_t i = n - 1; i >= 0; --i) {
    const T here = arriving[i], density = ray.density[i], delta = ray.delta[i];
    T q = up.weights[i] + fma(up.depth, ray.t[i], up.opacity);
    for (int64_t c = 0; c < ray.channels; ++c) q = fma(up.features[c], ray.features[i * ray.channels + c], q);
    const T g = next * q - T(behind);
    behind += here * one_minus_exp(density * delta) * q;
    next = here;
    if (out.density != nullptr) out.density[i] = delta * g;
    if (out.delta != nullptr) out.delta[i] = density * g;
  }
  return left;
}

}  // namespace gan3d
