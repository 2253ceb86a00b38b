// What the CPU side of every op uses: argument checks in words, a parallel loop, dispatch over float and double.
// Only the narrow torch headers: a translation unit compiles in seconds.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "checks.h"
#include "common.h"

#ifndef _OPENMP
#error "at::parallel_for is a serial loop without -fopenmp"
#endif

namespace gan3d {

// f(i) for i in [0, n), in pieces of at least `grain`. Every i belongs to one thread: results do not depend on how many
// there are, as long as f(i) writes only what i owns.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

constexpr int64_t kLarge = int64_t(4) << 20;  // bytes

// Asks for large pages under what is about to be written for the first time. The kernel clears fresh memory page by page
// when it is first touched, which takes longer than writing what is to be in it; large pages take a third of the time.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = uintptr_t(1) << 21;
  const uintptr_t data = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t from = (data + page - 1) / page * page, to = (data + uintptr_t(bytes)) / page * page;
  if (bytes >= kLarge && from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // may be declined
#endif
}

// at::empty, on large pages if it is large.
inline at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor x = at::empty(sizes, options);
  if (x.numel() > 0) prefer_huge_pages(x.mutable_data_ptr(), int64_t(x.nbytes()));
  return x;
}

}  // namespace gan3d
