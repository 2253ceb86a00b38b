// N adjacent numbers as one value of the processor's. Memory is read and written at any alignment; N is a power of two.
#pragma once

#include <cstring>

#include "common.h"

namespace gan3d {

#ifndef __CUDACC__
template <class T, int N>
struct LanesOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T>
struct LanesOf<T, 1> {
  typedef T type;
};
#endif

template <class V, class T>
HD V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <class V, class T>
HD void store(T* to, V v) { std::memcpy(to, &v, sizeof(V)); }

}  // namespace gan3d
