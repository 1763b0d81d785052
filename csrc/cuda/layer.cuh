#pragma once
// What elementwise kernels of layers share on CUDA: a thread's 8 consecutive elements, 16 bytes at a time where data is
// aligned. No torch.
#include <cuda_runtime.h>

#include "cuda/lane.cuh"
#include "cuda/layers.h"

namespace pyzo::cuda {

constexpr int kLayerThreads = 256;
constexpr int kEach = 8;  // elements of a thread

// The first element of this thread.
__device__ __forceinline__ int64_t first_element() {
  return (int64_t(blockIdx.x) * kLayerThreads + threadIdx.x) * kEach;
}

inline unsigned blocks_for(int64_t n) { return unsigned((n + kLayerThreads * kEach - 1) / (kLayerThreads * kEach)); }

// Elements [i, i + 8) of n; those past the end are 0.
template <Dtype T>
__device__ __forceinline__ void load_each(const void* from, int64_t i, int64_t n, float x[kEach]) {
  if (i + kEach <= n && (reinterpret_cast<uintptr_t>(from) & 15) == 0) {
    const int64_t at[2] = {i, i + 4};
    return load8<T>(from, at, x);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) x[k] = i + k < n ? widen<T>(static_cast<const Storage<T>*>(from)[i + k]) : 0.0f;
}

// Rounded to nearest.
template <Dtype T>
__device__ __forceinline__ void store_each(void* to, int64_t i, int64_t n, float x[kEach]) {
#pragma unroll
  for (int k = 0; k < kEach; ++k) x[k] = to_storage<Lane, T>(x[k]);
  if (i + kEach <= n && (reinterpret_cast<uintptr_t>(to) & 15) == 0) {
    const int64_t at[2] = {i, i + 4};
    return store8<T>(to, at, x);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (i + k < n) static_cast<Storage<T>*>(to)[i + k] = narrow<T>(x[k]);
}

template <Dtype T>
struct DtypeTag {
  static constexpr Dtype value = T;
};

// Calls run(DtypeTag<T>{}), which launches a kernel; returns the CUDA error code.
template <class Run>
int launch_for(Dtype dtype, const Run& run) {
  switch (dtype) {
    case kFloat32:
      run(DtypeTag<kFloat32>{});
      break;
    case kBFloat16:
      run(DtypeTag<kBFloat16>{});
      break;
    case kFloat16:
      run(DtypeTag<kFloat16>{});
      break;
    case kFloat64:
      return cudaErrorInvalidValue;  // refused before
  }
  return cudaGetLastError();
}

}  // namespace pyzo::cuda
