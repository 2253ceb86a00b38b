// What every ray and point function is built from. Torch-free; compiled by g++ and by nvcc.
//
// Neither compiler may fuse a product and a sum by itself (-ffp-contract=off, --fmad=false): where a fused
// multiply-add is meant, `fma` says so. What a header writes is therefore what the CPU and the GPU compute, to the bit,
// as long as it uses +, −, ×, ÷, sqrt, fma, floor and the functions of this file.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

namespace gan3d {

template <class T>
struct Vec3 {
  T x, y, z;
  HD T operator[](int axis) const { return axis == 0 ? x : axis == 1 ? y : z; }
};

template <class T>
HD Vec3<T> load3(const T* p) { return {p[0], p[1], p[2]}; }

HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
HD double fma(double a, double b, double c) { return ::fma(a, b, c); }

template <class T>
HD T min(T a, T b) { return b < a ? b : a; }
template <class T>
HD T max(T a, T b) { return a < b ? b : a; }
template <class T>
HD T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }

// e^x, the same bits on every device; loops over it vectorise. Error below 1.5 units in the last place between −87.3
// and 88.7 (tests/ops/test_common.py); beyond, 0 and inf.
HD float exp_reduced(float r) {  // (e^r − 1 − r) / r² for |r| ≤ ln2/2; minimax coefficients of Cephes' expf
  float p = 1.98756912e-4f;
  p = fma(p, r, 1.39819994e-3f);
  p = fma(p, r, 8.33345205e-3f);
  p = fma(p, r, 4.16657962e-2f);
  p = fma(p, r, 1.66666657e-1f);
  return fma(p, r, 5.0e-1f);
}
HD float without_powers(float x, float k) { return fma(k, -1.42860677e-6f, fma(k, -0.693145752f, x)); }  // x − k·ln2
HD float nearest_power(float x) {  // x/ln2 rounded: adding 1.5·2^23 leaves the integer in the last bits of the sum
  const float shift = 12582912.0f;
  return fma(x, 1.44269504f, shift) - shift;
}

HD float exp(float x) {
  const float k = clamp(nearest_power(x), -127.0f, 128.0f), r = without_powers(x, k);
  const float p = fma(exp_reduced(r), r * r, r + 1.0f);
  const int32_t half = int32_t(k) >> 1;  // 2^k in two steps: 2^128 alone is no float
  union { int32_t i; float f; } a{(half + 127) << 23}, b{(int32_t(k) - half + 127) << 23};
  const float y = p * a.f * b.f;
  return x < -87.33654f ? 0.0f : x > 88.72283f ? INFINITY : y;
}
HD double exp(double x) { return ::exp(x); }

// 1 − e^−x, the same bits on every device; loops over it vectorise. For x ≥ 0 the relative error is below 2 units in the
// last place, however small x is (tests/ops/test_composite.py): the 1 of exp is never added to what is small.
HD float one_minus_exp(float x) {
  const float y = -clamp(x, -88.0f, 32.0f), k = nearest_power(y), r = without_powers(y, k);  // e^−32 is nothing beside 1
  const float p = fma(exp_reduced(r), r * r, r);
  union { int32_t i; float f; } scale{(int32_t(k) + 127) << 23};
  return fma(-scale.f, p, 1.0f - scale.f);
}
HD double one_minus_exp(double x) { return -::expm1(-x); }

// Philox-like counter generator: 32 random bits of (seed, a, b), without a state. The same on every device.
HD uint32_t random_bits(uint64_t seed, uint32_t a, uint32_t b) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {  // Philox2x32-10 (Salmon et al., 2011), the two halves of the key mixed in
    const uint64_t product = uint64_t(0xD256D193u) * a;
    a = uint32_t(product >> 32) ^ key0 ^ b;
    b = uint32_t(product);
    key0 += 0x9E3779B9u;
    if (round == 4) key0 ^= key1;
  }
  return a;
}

// Uniform in [0, 1): a multiple of 2^−24, exact in float and double.
template <class T>
HD T random_unit(uint64_t seed, uint32_t a, uint32_t b) { return T(random_bits(seed, a, b) >> 8) * T(5.9604644775390625e-8); }

// Cells of a grid: cubes of the largest power-of-two side that divides X, Y and Z, in raster order; within a cube,
// Morton order with x lowest. A 128³ grid is one cube (pure Morton order), 160³ is 5³ cubes of 32³. Sides must be
// multiples of 4: then every 64 consecutive cells are a block of 4³, and one 64-bit word of an occupancy bit field.
struct Cells {
  int32_t x, y, z;  // the sides
  int32_t shift;    // log2 of the cube's side

  HD static uint32_t spread(uint32_t v) {  // 10 bits to every third
    v = (v * 0x00010001u) & 0xFF0000FFu;
    v = (v * 0x00000101u) & 0x0F00F00Fu;
    v = (v * 0x00000011u) & 0xC30C30C3u;
    return (v * 0x00000005u) & 0x49249249u;
  }
  HD static uint32_t gather(uint32_t v) {
    v &= 0x49249249u;
    v = (v | (v >> 2)) & 0xC30C30C3u;
    v = (v | (v >> 4)) & 0x0F00F00Fu;
    v = (v | (v >> 8)) & 0xFF0000FFu;
    return (v | (v >> 16)) & 0x0000FFFFu;
  }
  HD int64_t count() const { return int64_t(x) * y * z; }
  HD bool contains(int32_t i, int32_t j, int32_t k) const {
    return uint32_t(i) < uint32_t(x) && uint32_t(j) < uint32_t(y) && uint32_t(k) < uint32_t(z);
  }
  HD int64_t index(int32_t i, int32_t j, int32_t k) const {
    const uint32_t mask = (1u << shift) - 1;
    const uint32_t low = spread(i & mask) | (spread(j & mask) << 1) | (spread(k & mask) << 2);
    const int64_t cube = (int64_t(i >> shift) * (y >> shift) + (j >> shift)) * (z >> shift) + (k >> shift);
    return (cube << (3 * shift)) | low;
  }
  HD void position(int64_t index, int32_t& i, int32_t& j, int32_t& k) const {
    const uint32_t low = uint32_t(index & ((int64_t(1) << (3 * shift)) - 1));
    int64_t cube = index >> (3 * shift);
    const int32_t ny = y >> shift, nz = z >> shift;
    k = int32_t(cube % nz) << shift | int32_t(gather(low >> 2));
    cube /= nz;
    j = int32_t(cube % ny) << shift | int32_t(gather(low >> 1));
    i = int32_t(cube / ny) << shift | int32_t(gather(low));
  }
};

HD Cells make_cells(int64_t x, int64_t y, int64_t z) {
  int32_t shift = 0;
  while (shift < 10 && (((x | y | z) >> shift) & 1) == 0) ++shift;
  return {int32_t(x), int32_t(y), int32_t(z), shift};
}

HD int popcount(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __popcll(bits);
#else
  return __builtin_popcountll(bits);
#endif
}

// Which cells exist, one bit each in the order of Cells, and where their values are: the row of an existing cell is the
// number of existing cells before it. 64 cells (a block of 4³) take 12 bytes, whatever the resolution.
struct VoxelIndex {
  const int64_t* words;  // bit i of word w: cell 64·w + i
  const int32_t* rank;   // existing cells before each word
  Cells cells;

  HD bool exists(int64_t cell) const { return (uint64_t(words[cell >> 6]) >> (cell & 63)) & 1; }
  HD int32_t row(int64_t cell) const {  // −1: no such voxel
    const uint64_t word = uint64_t(words[cell >> 6]), bit = uint64_t(1) << (cell & 63);
    return word & bit ? rank[cell >> 6] + popcount(word & (bit - 1)) : -1;
  }
};

}  // namespace gan3d
