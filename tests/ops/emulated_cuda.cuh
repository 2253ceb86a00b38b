// Stands in for csrc/cuda.cuh where a test compiles the CUDA sources with a C++ compiler: the threads of a kernel run one
// after the other. What runs is the code of every kernel, with its indices; not the GPU's memory or scheduling.
#pragma once

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "checks.h"
#include "common.h"

#define __device__
#define __global__
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) _TORCH_LIBRARY_IMPL(gan3d_emulated, CPU, m, C10_UID)

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
}  // namespace c10::cuda

template <class T>
T atomicAdd(T* where, T what) {
  const T old = *where;
  *where += what;
  return old;
}
template <class T>
T atomicMax(T* where, T what) {
  const T old = *where;
  if (what > old) *where = what;
  return old;
}
template <class T>
T __ldg(const T* where) { return *where; }
inline int __float_as_int(float x) {
  union { float f; int i; } u{x};
  return u.i;
}
inline long long __double_as_longlong(double x) {
  union { double f; long long i; } u{x};
  return u.i;
}
inline float __int_as_float(int x) {
  union { int i; float f; } u{x};
  return u.f;
}

namespace gan3d {

// Backwards, so that a kernel that relies on the order of its threads is found out.
template <class F>
void for_each(int64_t n, const F& f) {
  for (int64_t i = n - 1; i >= 0; --i) f(i);
}

}  // namespace gan3d
