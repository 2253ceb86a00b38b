// The widest vector of the processor as a number type: a block of points, one a lane, for the functions of tiny_mlp.h.
#pragma once

#include <utility>

#include "lanes.h"
#include "tiny_mlp.h"

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace gan3d::mlp {

#if defined(__AVX512F__)
constexpr int kLaneBytes = 64, kVectors = 4;  // 6 outputs × 4 vectors are summed in 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32, kVectors = 2;  // 12 of 16 registers
#else
constexpr int kLaneBytes = 16, kVectors = 2;
#endif

template <class S>
using Wide = typename LanesOf<S, kLaneBytes / int(sizeof(S))>::type;
using FloatLanes = Wide<float>;
using DoubleLanes = Wide<double>;

// Vectors exist in registers only: memory is read and written as S.
template <class T, class S>
struct LaneMemory {
  using Scalar = S;
  static constexpr int count = int(sizeof(T) / sizeof(S));
  HD static T load(const S* p) { return gan3d::load<T>(p); }
  HD static void store(S* p, T v) { gan3d::store(p, v); }
  HD static T broadcast(S s) { return s - T{}; }
  HD static T fused(T a, T b, T c) {  // for processors without the instructions below
    T r;
    for (int i = 0; i < count; ++i) r[i] = fma(S(a[i]), S(b[i]), S(c[i]));
    return r;
  }
};

// −ffp-contract=off: no compiler makes these of a product and a sum, and GCC does not of a loop over the lanes.
template <>
struct Lane<FloatLanes> : LaneMemory<FloatLanes, float> {
#if defined(__AVX512F__)
  HD static FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) {
    return FloatLanes(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
  }
#elif defined(__AVX2__) && defined(__FMA__)
  HD static FloatLanes fused(FloatLanes a, FloatLanes b, FloatLanes c) {
    return FloatLanes(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
  }
#endif
};
template <>
struct Lane<DoubleLanes> : LaneMemory<DoubleLanes, double> {
#if defined(__AVX512F__)
  HD static DoubleLanes fused(DoubleLanes a, DoubleLanes b, DoubleLanes c) {
    return DoubleLanes(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
  }
#elif defined(__AVX2__) && defined(__FMA__)
  HD static DoubleLanes fused(DoubleLanes a, DoubleLanes b, DoubleLanes c) {
    return DoubleLanes(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
  }
#endif
};

template <int Step, bool High, class T, int... I>
HD T exchange(T a, T b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  // Low: lanes without the bit from a, those with it from b, moved down to meet; high: the other way round.
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, (High ? (I & Step ? n + I : I + Step) : (I & Step ? n + I - Step : I))...);
#else
  using Index = decltype(a < b);
  return __builtin_shuffle(a, b, Index{(High ? (I & Step ? n + I : I + Step) : (I & Step ? n + I - Step : I))...});
#endif
}

// Transposes rows[0 … lanes−1]: row i, lane j ↔ row j, lane i. log2(lanes) rounds of pairwise exchanges.
template <int Step = 1, class T>
HD void transpose(T (&rows)[Lane<T>::count]) {
  constexpr int n = Lane<T>::count;
  if constexpr (Step < n) {
    GAN3D_UNROLL
    for (int i = 0; i < n; ++i) {
      if (i & Step) continue;
      const T a = rows[i], b = rows[i + Step];
      rows[i] = exchange<Step, false>(a, b, std::make_integer_sequence<int, n>{});
      rows[i + Step] = exchange<Step, true>(a, b, std::make_integer_sequence<int, n>{});
    }
    transpose<2 * Step>(rows);
  }
}

}  // namespace gan3d::mlp
