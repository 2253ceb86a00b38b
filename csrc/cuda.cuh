// What the CUDA side of every op uses: one thread per ray or point.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "checks.h"
#include "common.h"

namespace gan3d {

template <class F>
__global__ void for_each_kernel(int64_t n, F f) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) f(i);
}

// f(i) for i in [0, n), one thread each, on the current stream of the current device (set a CUDAGuard first).
template <class F>
void for_each(int64_t n, const F& f) {
  if (n == 0) return;
  constexpr int threads = 128;
  const int64_t blocks = (n + threads - 1) / threads;
  for_each_kernel<<<unsigned(blocks < 1 << 20 ? blocks : 1 << 20), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(n, f);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace gan3d
