// Small fully connected networks, one point at a time: KiloNeRF's students, Instant-NGP's heads, EG3D's decoder.
//
// T is what holds a number: S itself (float or double) where a thread has one point, a vector of S where it has a block
// of them, one a lane (tiny_mlp_lanes.h). Sums run in the same order for both: bias, then inputs in ascending order,
// each by a fused multiply-add, so the CPU's and the GPU's float32 outputs agree to the bit.
#pragma once

#include "common.h"

#ifdef __CUDACC__
#define GAN3D_UNROLL _Pragma("unroll")
#else
#define GAN3D_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gan3d::mlp {

constexpr int kMaxMlpLayers = 8, kMaxMlpInput = 128, kMaxMlpWidth = 64;

enum Activation : int32_t { kLinear, kRelu, kSoftplus };

// Layers 0 … layers−1, from widths[l] to widths[l+1]; the activation follows each but the last. Parameters are layer
// after layer: weight [out in], then bias [out].
struct Mlp {
  int32_t layers, activation, bias;
  int32_t widths[kMaxMlpLayers + 1];

  HD int weight(int layer) const {  // where its weight begins
    int at = 0;
    for (int l = 0; l < layer; ++l) at += widths[l + 1] * (widths[l] + bias);
    return at;
  }
  HD int parameters() const { return weight(layers); }
  HD int inputs() const { return widths[0]; }
  HD int outputs() const { return widths[layers]; }
};

template <class T>
struct Lane {
  using Scalar = T;
  static constexpr int count = 1;
  HD static T load(const T* p) { return *p; }
  HD static void store(T* p, T v) { *p = v; }
  HD static T broadcast(T s) { return s; }
  HD static T fused(T a, T b, T c) { return fma(a, b, c); }
};

template <class S>
HD S parameter(const S* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

// log(1 + t), 0 ≤ t ≤ 1: 2·artanh(t / (2 + t)), precise for small t too; the polynomial is minimax, error 4e-10.
HD float log1p_unit(float t) {
  const float s = t / (2.0f + t), z = s * s, twice = s + s;
  float p = 0.116268894f;
  p = fma(p, z, 0.108500211f);
  p = fma(p, z, 0.142964053f);
  p = fma(p, z, 0.199998482f);
  p = fma(p, z, 0.333333337f);
  return fma(twice * z, p, twice);
}
HD double log1p_unit(double t) { return ::log1p(t); }

// log(1 + e^x), and x itself above 20, as torch has it.
template <class S>
HD S softplus(S x) {
  const S y = max(x, S(0)) + log1p_unit(exp(x < S(0) ? x : -x));
  return x > S(20) ? x : y;
}

template <class S>
HD void activate(S* h, int count, int activation) {
  if (activation == kRelu) {
    for (int i = 0; i < count; ++i) h[i] = max(h[i], S(0));
  } else if (activation == kSoftplus) {
#ifndef __CUDACC__
#pragma omp simd
#endif
    for (int i = 0; i < count; ++i) h[i] = softplus(h[i]);
  }
}

// delta ← delta · derivative of the activation, from the activation's value h: softplus' is 1 − e^(−h).
template <class S>
HD void activate_backward(const S* h, S* delta, int count, int activation) {
  if (activation == kRelu) {
    for (int i = 0; i < count; ++i) delta[i] = h[i] > S(0) ? delta[i] : S(0);
  } else if (activation == kSoftplus) {
#ifndef __CUDACC__
#pragma omp simd
#endif
    for (int i = 0; i < count; ++i) delta[i] *= h[i] > S(20) ? S(1) : one_minus_exp(h[i]);
  }
}

// y[r] = start + Σ_k a[r·row + k·step] · x[k]: R rows, V vectors wide. start: bias[r], what y holds, or 0.
template <int R, int V, class T, class S>
HD void product_tile(const S* a, int row, int step, const S* x, int x_stride, int depth, const S* bias, bool add, S* y,
                     int y_stride) {
  using L = Lane<T>;
  T sum[R][V];
  GAN3D_UNROLL
  for (int r = 0; r < R; ++r) {
    const T start = L::broadcast(bias ? parameter(bias + r) : S(0));
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = add ? L::load(y + r * y_stride + v * L::count) : start;
  }
  for (int k = 0; k < depth; ++k) {
    T column[V];
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) column[v] = L::load(x + k * x_stride + v * L::count);
    GAN3D_UNROLL
    for (int r = 0; r < R; ++r) {
      const T w = L::broadcast(parameter(a + r * row + k * step));
      GAN3D_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = L::fused(w, column[v], sum[r][v]);
    }
  }
  GAN3D_UNROLL
  for (int r = 0; r < R; ++r) {
    GAN3D_UNROLL
    for (int v = 0; v < V; ++v) L::store(y + r * y_stride + v * L::count, sum[r][v]);
  }
}

struct Nothing {
  HD void operator()() const {}
};

// The same for any number of rows, in tiles of about equal height: as many sums as the registers hold, whatever the size.
// `meanwhile` is called once a tile: the CPU fetches there what comes next.
template <int V, class T, class S, class F>
HD void product(const S* a, int row, int step, const S* x, int x_stride, int depth, const S* bias, bool add, S* y,
                int y_stride, int rows, F& meanwhile) {
  constexpr int most = 6;
  int tiles = (rows + most - 1) / most;
  for (int r = 0; r < rows;) {
    meanwhile();
    const int height = (rows - r + tiles - 1) / tiles;
    const S* b = bias ? bias + r : nullptr;
#define GAN3D_TILE(R) \
  case R: product_tile<R, V, T>(a + r * row, row, step, x, x_stride, depth, b, add, y + r * y_stride, y_stride); break;
    switch (height) { GAN3D_TILE(1) GAN3D_TILE(2) GAN3D_TILE(3) GAN3D_TILE(4) GAN3D_TILE(5) GAN3D_TILE(6) }
#undef GAN3D_TILE
    r += height;
    --tiles;
  }
}

// One layer at V vectors of points: x [in, V·lanes] → y [out, V·lanes], activated unless it is the last.
template <int V, class T, class S, class F>
HD void mlp_layer(const Mlp& m, int layer, const S* parameters, const S* x, S* y, F& meanwhile) {
  constexpr int points = V * Lane<T>::count;
  const int in = m.widths[layer], out = m.widths[layer + 1];
  const S* w = parameters + m.weight(layer);
  product<V, T>(w, in, 1, x, points, in, m.bias ? w + in * out : nullptr, false, y, points, out, meanwhile);
  if (layer + 1 < m.layers) activate(y, out * points, m.activation);
}

// The gradient at a layer's sums, delta [out, V·lanes] → that at the sums of the layer before, whose activated values
// are h [in, V·lanes]; before the first layer there is no activation, and h is not read.
template <int V, class T, class S, class F>
HD void mlp_layer_backward(const Mlp& m, int layer, const S* parameters, const S* delta, const S* h, S* before,
                           F& meanwhile) {
  constexpr int points = V * Lane<T>::count;
  const int in = m.widths[layer], out = m.widths[layer + 1];
  product<V, T>(parameters + m.weight(layer), 1, in, delta, points, out, static_cast<const S*>(nullptr), false, before,
                points, in, meanwhile);
  if (layer > 0) activate_backward(h, before, in * points, m.activation);
}

}  // namespace gan3d::mlp
