// One ray of volume rendering: samples front to back → what it sees, and the derivatives. NeRF (2020), eq. 3.
//
// x = density·delta, α = 1 − e^(−x), T is what light is left on arrival, w = T·α. A ray ends before the first sample
// that finds T below the threshold. Every loop over samples or channels vectorises but the product that makes T.
#pragma once

#include "common.h"

namespace gan3d {

constexpr int kBlock = 64;  // samples whose exponentials are taken together, on the stack

// α = 1 − e^(−x) and e^(−x) from one reduction of the argument. α is accurate relative to itself, however small x is.
HD void absorb(float x, float& alpha, float& left) {
  const float y = -clamp(x, -87.0f, 87.0f);
  const float shift = 12582912.0f;
  const float k = fma(y, 1.44269504f, shift) - shift;
  float r = fma(k, -0.693145752f, y);
  r = fma(k, -1.42860677e-6f, r);
  float p = 1.98756912e-4f;
  p = fma(p, r, 1.39819994e-3f);
  p = fma(p, r, 8.33345205e-3f);
  p = fma(p, r, 4.16657962e-2f);
  p = fma(p, r, 1.66666657e-1f);
  p = fma(p, r, 5.0e-1f);
  p = fma(p, r * r, r);  // e^r − 1
  union { int32_t i; float f; } scale{(int32_t(k) + 127) << 23};
  left = fma(scale.f, p, scale.f);
  alpha = -fma(scale.f, p, scale.f - 1.0f);
}
HD void absorb(double x, double& alpha, double& left) {
  left = ::exp(-x);
  alpha = -::expm1(-x);
}

// C channels known to the compiler, or c of them (C = 0).
template <int C, class T>
HD void add_features(const T* weight, const T* features, int64_t count, int64_t c, T* sum) {
  if constexpr (C > 0) {
    T part[4][C] = {};  // four independent sums, or each addition would wait for the one before
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      for (int u = 0; u < 4; ++u)
        for (int k = 0; k < C; ++k) part[u][k] = fma(weight[i + u], features[(i + u) * C + k], part[u][k]);
    for (; i < count; ++i)
      for (int k = 0; k < C; ++k) part[0][k] = fma(weight[i], features[i * C + k], part[0][k]);
    for (int k = 0; k < C; ++k) sum[k] += (part[0][k] + part[1][k]) + (part[2][k] + part[3][k]);
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < c; ++k) sum[k] = fma(weight[i], features[i * c + k], sum[k]);
  }
}

// background, feature: c numbers. Returns how many samples were looked at.
template <int C, class T>
HD int64_t composite_ray(int64_t s, int64_t c, const T* density, const T* delta, const T* features, const T* t,
                         const T* background, T threshold, T* feature, T* depth, T* opacity, T* weights) {
  T left = 1, total = 0, distance = 0;
  int64_t seen = 0;
  for (int64_t k = 0; k < c; ++k) feature[k] = 0;
  while (seen < s && left >= threshold) {
    T alpha[kBlock], after[kBlock], weight[kBlock];
    int64_t count = min<int64_t>(kBlock, s - seen);
    for (int64_t i = 0; i < count; ++i) absorb(density[seen + i] * delta[seen + i], alpha[i], after[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (left < threshold) {
        count = i;
        break;
      }
      weight[i] = left * alpha[i];
      left *= after[i];
    }
    T block_total = 0, block_distance = 0;
#pragma omp simd reduction(+ : block_total, block_distance)
    for (int64_t i = 0; i < count; ++i) {
      weights[seen + i] = weight[i];
      block_total += weight[i];
      block_distance += weight[i] * t[seen + i];
    }
    total += block_total;
    distance += block_distance;
    add_features<C>(weight, features + seen * c, count, c, feature);
    seen += count;
  }
  for (int64_t i = seen; i < s; ++i) weights[i] = 0;
  if (background != nullptr)
    for (int64_t k = 0; k < c; ++k) feature[k] = fma(left, background[k], feature[k]);
  *depth = distance;
  *opacity = total;
  return seen;
}

// Derivatives by optical thickness: ∂L/∂x_i = T_{i+1}·q_i − Σ_{j>i} w_j·q_j − g_T·T_end with q_i the derivative by w_i.
// `pull`, `transmittance` and `weight` are work space for s numbers each. Null pointers: not wanted.
template <int C, class T>
HD void composite_ray_backward(int64_t s, int64_t c, const T* density, const T* delta, const T* features, const T* t,
                               const T* background, T threshold, const T* g_feature, T g_depth, T g_opacity,
                               const T* g_weights, T* pull, T* transmittance, T* weight, T* d_density, T* d_delta,
                               T* d_features, T* d_t, T* d_background) {
  T left = 1;
  int64_t seen = 0;
  while (seen < s && left >= threshold) {  // again the T on arrival, and q
    T alpha[kBlock], after[kBlock];
    int64_t count = min<int64_t>(kBlock, s - seen);
    for (int64_t i = 0; i < count; ++i) absorb(density[seen + i] * delta[seen + i], alpha[i], after[i]);
    for (int64_t i = 0; i < count; ++i) {
      if (left < threshold) {
        count = i;
        break;
      }
      transmittance[seen + i] = left;
      weight[seen + i] = left * alpha[i];
      left *= after[i];
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* f = features + (seen + i) * c;
      T q = fma(g_depth, t[seen + i], g_opacity + g_weights[seen + i]);
      if constexpr (C > 0 && C <= 16) {
        for (int k = 0; k < C; ++k) q = fma(g_feature[k], f[k], q);
      } else {
        T sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t k = 0; k < c; ++k) sum += g_feature[k] * f[k];
        q += sum;
      }
      pull[seen + i] = q;
    }
    seen += count;
  }
  T behind = 0;  // what lies behind sample i pulls on its thickness with this
  if (background != nullptr) {
    for (int64_t k = 0; k < c; ++k) behind = fma(g_feature[k], background[k], behind);
    behind *= left;
    if (d_background != nullptr)
      for (int64_t k = 0; k < c; ++k) d_background[k] = left * g_feature[k];
  }
  T next = left;
  for (int64_t i = seen - 1; i >= 0; --i) {
    const T q = pull[i];
    pull[i] = fma(next, q, -behind);  // ∂L/∂x
    behind = fma(weight[i], q, behind);
    next = transmittance[i];
  }
  if (d_density != nullptr)
    for (int64_t i = 0; i < seen; ++i) d_density[i] = delta[i] * pull[i];
  if (d_delta != nullptr)
    for (int64_t i = 0; i < seen; ++i) d_delta[i] = density[i] * pull[i];
  if (d_t != nullptr)
    for (int64_t i = 0; i < seen; ++i) d_t[i] = weight[i] * g_depth;
  if (d_features != nullptr)
    for (int64_t i = 0; i < seen; ++i)
      for (int64_t k = 0; k < (C > 0 ? C : c); ++k) d_features[i * c + k] = weight[i] * g_feature[k];
  for (int64_t i = seen; i < s; ++i) {
    if (d_density != nullptr) d_density[i] = 0;
    if (d_delta != nullptr) d_delta[i] = 0;
    if (d_t != nullptr) d_t[i] = 0;
    if (d_features != nullptr)
      for (int64_t k = 0; k < c; ++k) d_features[i * c + k] = 0;
  }
}

}  // namespace gan3d
