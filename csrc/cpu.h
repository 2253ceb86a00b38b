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

}  // namespace gan3d
