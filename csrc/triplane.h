// Bilinear interpolation of three feature planes, summed. A pixel's channels are contiguous; all else is strides, so the
// planes may be the channels of one image in channels_last memory.
#pragma once

#include "trilinear.h"

namespace gan3d {

constexpr int kPlanes = 3;

struct Planes {
  int32_t height, width, channels;
  int64_t batch, plane, row, column;  // strides in numbers
  int32_t axes[2 * kPlanes];          // of plane p: 2p runs along its width, 2p + 1 along its height
};

template <class T>
struct Bilinear {
  Axis<T> u, v;                      // along width and height
  int64_t first, step_u, step_v;     // where the four pixels lie, in numbers

  HD bool nothing() const { return u.nothing() || v.nothing(); }
  HD int64_t pixel(int corner) const { return first + (corner & 2 ? step_v : 0) + (corner & 1 ? step_u : 0); }
  HD T weight(int corner) const {
    return (corner & 2 ? v.weight_hi : v.weight_lo) * (corner & 1 ? u.weight_hi : u.weight_lo);
  }
};

// −1 and 1 are the outer edges of the outer pixels.
template <class T>
HD T pixel_coordinate(T x, int32_t side) { return ((x + T(1)) * T(side) - T(1)) / T(2); }

// In the plane: add plane·planes.plane for where it begins.
template <class T>
HD Bilinear<T> bilinear(const T* point, int plane, const Planes& planes) {
  Bilinear<T> s;
  s.u = zeros_axis(pixel_coordinate(point[planes.axes[2 * plane]], planes.width), planes.width);
  s.v = zeros_axis(pixel_coordinate(point[planes.axes[2 * plane + 1]], planes.height), planes.height);
  s.first = s.v.lo * planes.row + s.u.lo * planes.column;
  s.step_u = (s.u.hi - s.u.lo) * planes.column;
  s.step_v = (s.v.hi - s.v.lo) * planes.row;
  return s;
}

// scale · Σ over planes; `s` holds one stencil a plane.
template <int C, class T>
HD void triplane_value(const T* values, const Bilinear<T>* s, const Planes& planes, T scale, T* out) {
  const int n = C > 0 ? C : planes.channels;
  for (int p = 0; p < kPlanes; ++p) {
    const T* plane = values + p * planes.plane;
    const T *v0 = plane + s[p].pixel(0), *v1 = plane + s[p].pixel(1), *v2 = plane + s[p].pixel(2),
            *v3 = plane + s[p].pixel(3);
    const T w0 = scale * s[p].weight(0), w1 = scale * s[p].weight(1), w2 = scale * s[p].weight(2),
            w3 = scale * s[p].weight(3);
#pragma omp simd
    for (int c = 0; c < n; ++c) {
      const T value = fma(w3, v3[c], fma(w2, v2[c], fma(w1, v1[c], w0 * v0[c])));
      out[c] = p == 0 ? value : out[c] + value;
    }
  }
}

// Adds the gradient of scale·Σ g·value of one plane to that of the point.
template <int C, class T>
HD void bilinear_slope(const T* plane_values, const Bilinear<T>& s, int plane, const Planes& planes, T scale,
                       const T* g, T* grad_point) {
  const int n = C > 0 ? C : planes.channels;
  const T *v0 = plane_values + s.pixel(0), *v1 = plane_values + s.pixel(1), *v2 = plane_values + s.pixel(2),
          *v3 = plane_values + s.pixel(3);
  T dot0 = 0, dot1 = 0, dot2 = 0, dot3 = 0;
#pragma omp simd reduction(+ : dot0, dot1, dot2, dot3)
  for (int c = 0; c < n; ++c) {
    dot0 += g[c] * v0[c], dot1 += g[c] * v1[c];  // an fma would not vectorise here
    dot2 += g[c] * v2[c], dot3 += g[c] * v3[c];
  }
  const T along_u = s.v.weight_lo * (s.u.slope_lo * dot0 + s.u.slope_hi * dot1) +
                    s.v.weight_hi * (s.u.slope_lo * dot2 + s.u.slope_hi * dot3);
  const T along_v = s.v.slope_lo * (s.u.weight_lo * dot0 + s.u.weight_hi * dot1) +
                    s.v.slope_hi * (s.u.weight_lo * dot2 + s.u.weight_hi * dot3);
  grad_point[planes.axes[2 * plane]] += scale * (T(planes.width) / T(2)) * along_u;
  grad_point[planes.axes[2 * plane + 1]] += scale * (T(planes.height) / T(2)) * along_v;
}

}  // namespace gan3d
