// Real spherical harmonics of a unit direction, degree 0 to 4. Order l² + l + m; constants and signs of PlenOctrees and
// Plenoxels, so their files can be read.
#pragma once

#include "common.h"

namespace gan3d {

constexpr int kMaxShTerms = 25;

template <class T>
HD void sh_basis(Vec3<T> d, int degree, T* out) {
  const T x = d.x, y = d.y, z = d.z;
  out[0] = T(0.28209479177387814);
  if (degree < 1) return;
  out[1] = T(-0.4886025119029199) * y;
  out[2] = T(0.4886025119029199) * z;
  out[3] = T(-0.4886025119029199) * x;
  if (degree < 2) return;
  const T xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  out[4] = T(1.0925484305920792) * xy;
  out[5] = T(-1.0925484305920792) * yz;
  out[6] = T(0.31539156525252005) * (T(2) * zz - xx - yy);
  out[7] = T(-1.0925484305920792) * xz;
  out[8] = T(0.5462742152960396) * (xx - yy);
  if (degree < 3) return;
  out[9] = T(-0.5900435899266435) * y * (T(3) * xx - yy);
  out[10] = T(2.890611442640554) * xy * z;
  out[11] = T(-0.4570457994644658) * y * (T(4) * zz - xx - yy);
  out[12] = T(0.3731763325901154) * z * (T(2) * zz - T(3) * xx - T(3) * yy);
  out[13] = T(-0.4570457994644658) * x * (T(4) * zz - xx - yy);
  out[14] = T(1.445305721320277) * z * (xx - yy);
  out[15] = T(-0.5900435899266435) * x * (xx - T(3) * yy);
  if (degree < 4) return;
  out[16] = T(2.5033429417967046) * xy * (xx - yy);
  out[17] = T(-1.7701307697799304) * yz * (T(3) * xx - yy);
  out[18] = T(0.9461746957575601) * xy * (T(7) * zz - T(1));
  out[19] = T(-0.6690465435572892) * yz * (T(7) * zz - T(3));
  out[20] = T(0.10578554691520431) * (zz * (T(35) * zz - T(30)) + T(3));
  out[21] = T(-0.6690465435572892) * xz * (T(7) * zz - T(3));
  out[22] = T(0.47308734787878004) * (xx - yy) * (T(7) * zz - T(1));
  out[23] = T(-1.7701307697799304) * xz * (xx - T(3) * yy);
  out[24] = T(0.6258357354491761) * (xx * (xx - T(3) * yy) - yy * (T(3) * xx - yy));
}

// Gradient of Σ g[i]·basis[i] with respect to x, y and z as free variables (the basis is a polynomial in them).
template <class T>
HD Vec3<T> sh_basis_backward(Vec3<T> d, int degree, const T* g) {
  const T x = d.x, y = d.y, z = d.z;
  T gx = 0, gy = 0, gz = 0;
  if (degree >= 1) {
    gx += T(-0.4886025119029199) * g[3];
    gy += T(-0.4886025119029199) * g[1];
    gz += T(0.4886025119029199) * g[2];
  }
  const T xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, xz = x * z;
  if (degree >= 2) {
    const T a = T(1.0925484305920792), b = T(0.6307831305050401);
    gx += a * (y * g[4] - z * g[7] + x * g[8]) - b * x * g[6];
    gy += a * (x * g[4] - z * g[5] - y * g[8]) - b * y * g[6];
    gz += a * (-y * g[5] - x * g[7]) + T(2) * b * z * g[6];
  }
  if (degree >= 3) {
    const T a = T(-0.5900435899266435), b = T(2.890611442640554), c = T(-0.4570457994644658), e = T(0.3731763325901154);
    gx += a * (T(6) * xy * g[9] + T(3) * (xx - yy) * g[15]) + b * (yz * g[10] + xz * g[14]) +
          c * (T(-2) * xy * g[11] + (T(4) * zz - T(3) * xx - yy) * g[13]) - T(6) * e * xz * g[12];
    gy += a * (T(3) * (xx - yy) * g[9] - T(6) * xy * g[15]) + b * (xz * g[10] - yz * g[14]) +
          c * ((T(4) * zz - xx - T(3) * yy) * g[11] - T(2) * xy * g[13]) - T(6) * e * yz * g[12];
    gz += b * (xy * g[10] + T(0.5) * (xx - yy) * g[14]) + T(8) * c * (yz * g[11] + xz * g[13]) +
          T(3) * e * (T(2) * zz - xx - yy) * g[12];
  }
  if (degree >= 4) {
    const T a = T(2.5033429417967046), b = T(-1.7701307697799304), c = T(0.9461746957575601), e = T(-0.6690465435572892),
            f = T(0.10578554691520431), h = T(0.47308734787878004), k = T(0.6258357354491761);
    const T seven = T(7) * zz;
    gx += a * y * (T(3) * xx - yy) * g[16] + b * (T(6) * xy * z * g[17] + T(3) * z * (xx - yy) * g[23]) +
          c * y * (seven - T(1)) * g[18] + e * z * (seven - T(3)) * g[21] + h * T(2) * x * (seven - T(1)) * g[22] +
          k * T(4) * x * (xx - T(3) * yy) * g[24];
    gy += a * x * (xx - T(3) * yy) * g[16] + b * (T(3) * z * (xx - yy) * g[17] - T(6) * xy * z * g[23]) +
          c * x * (seven - T(1)) * g[18] + e * z * (seven - T(3)) * g[19] - h * T(2) * y * (seven - T(1)) * g[22] +
          k * T(4) * y * (yy - T(3) * xx) * g[24];
    gz += b * (y * (T(3) * xx - yy) * g[17] + x * (xx - T(3) * yy) * g[23]) + c * T(14) * xy * z * g[18] +
          e * (y * (T(3) * seven - T(3)) * g[19] + x * (T(3) * seven - T(3)) * g[21]) +
          f * z * (T(140) * zz - T(60)) * g[20] + h * T(14) * z * (xx - yy) * g[22];
  }
  return {gx, gy, gz};
}

}  // namespace gan3d
