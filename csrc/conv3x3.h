// 3×3 convolutions with fewer multiplications, after Winograd: weight and inputs of a tile are transformed, multiplied
// number by number, summed over channels, and transformed into outputs. Lavin and Gray (2016), sec. 4, arXiv 1509.09308
// Each transform is one of three to five numbers, along both axes in turn.
//
// T holds what adjacent channels have at one place: a float or a vector of them.
#pragma once

#include "common.h"

namespace gan3d::winograd {

constexpr int kSide = 4, kTransformed = kSide * kSide;  // both the weight and a tile's inputs, when transformed

// F(2×2, 3×3): 2×2 outputs of 4×4 inputs, 16 multiplications instead of 36.
struct Same {
  static constexpr int patch = 4, products = 4, outputs = 2;
  HD static int input(int k) { return k; }  // of the k-th product along an axis
  HD static int weight(int k) { return k; }

  template <class T>
  HD static void transform_input(T* d, int step) {
    const T a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
    d[0] = a - c, d[step] = b + c, d[2 * step] = c - b, d[3 * step] = b - e;
  }
  template <class T>
  HD static void transform_weight(T* g, int step) {
    const T a = g[0], even = (a + g[2 * step]) * 0.5f, odd = g[step] * 0.5f;
    g[3 * step] = g[2 * step], g[step] = even + odd, g[2 * step] = even - odd;
  }
  template <class T>
  HD static void transform_output(T* m, int step) {
    const T a = m[step], b = m[2 * step];
    m[0] = m[0] + a + b, m[step] = a - b - m[3 * step];
  }
};

// The transposed convolution with stride 2, z[2i + k] = Σ g[k] x[i]: 4×4 outputs of 3×3 inputs. Along an axis, outputs
// at even places take two taps each: F(2, 2), three products for two of them; those at odd places take one tap. 25
// multiplications instead of 36.
struct Up {
  static constexpr int patch = 3, products = 5, outputs = 4;
  HD static int input(int k) { return k < 3 ? k : 2 * k - 5; }  // 0 1 2 1 3
  HD static int weight(int k) { return k < 3 ? k : 3; }         // 0 1 2 3 3

  template <class T>
  HD static void transform_input(T* d, int step) {
    const T a = d[0], b = d[step], c = d[2 * step];
    d[0] = a - b, d[2 * step] = b - c, d[3 * step] = c;
  }
  template <class T>
  HD static void transform_weight(T* g, int step) {
    const T a = g[0], b = g[step], c = g[2 * step];
    g[0] = c, g[step] = a + c, g[2 * step] = a, g[3 * step] = b;
  }
  template <class T>
  HD static void transform_output(T* m, int step) {
    const T a = m[step], b = m[2 * step], odd = m[3 * step], next = m[4 * step];
    m[0] = m[0] + a, m[step] = odd, m[2 * step] = a - b, m[3 * step] = next;
  }
};

// The filter [1, 3, 3, 1] along one axis, times `scale`.
template <class T>
HD T smooth(T a, T b, T c, T d, T scale) { return scale * ((a + d) + T(3) * (b + c)); }

}  // namespace gan3d::winograd
