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

// Layers compute with what they read, which makes any NaN the device's own. So these need not keep a NaN's bits, as
// widen and narrow of cuda/lane.cuh do, and convert 16-bit numbers by the hardware's instructions, two at a time.
template <Dtype T>
__device__ __forceinline__ float number(Storage<T> x) {
  if constexpr (T == kFloat16)
    return __half2float(__ushort_as_half(x));
  else
    return widen<T>(x);
}

// Rounded to nearest, the first in the low half.
template <Dtype T>
__device__ __forceinline__ uint32_t two_rounded(float a, float b) {
  if constexpr (T == kBFloat16) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  } else {
    const __half2 two = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&two);
  }
}

template <Dtype T>
__device__ __forceinline__ Storage<T> rounded(float x) {
  if constexpr (T == kFloat32)
    return x;
  else
    return uint16_t(two_rounded<T>(x, 0.0f));
}

// 8 neighbouring elements, aligned to 16 bytes.
template <Dtype T>
__device__ __forceinline__ void load_eight(const Storage<T>* from, float x[kEach]) {
  if constexpr (T == kFloat32) {
    const int64_t at[2] = {0, 4};
    load8<T>(from, at, x);
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = number<T>(Storage<T>(words[k]));
      x[2 * k + 1] = T == kBFloat16 ? bits<float>(words[k] & 0xffff0000u) : number<T>(Storage<T>(words[k] >> 16));
    }
  }
}

// Rounded to nearest.
template <Dtype T>
__device__ __forceinline__ void store_eight(Storage<T>* to, const float x[kEach]) {
  if constexpr (T == kFloat32) {
    const int64_t at[2] = {0, 4};
    store8<T>(to, at, x);
  } else {
    store16(to, two_rounded<T>(x[0], x[1]), two_rounded<T>(x[2], x[3]), two_rounded<T>(x[4], x[5]),
            two_rounded<T>(x[6], x[7]));
  }
}

// Elements [i, i + 8) of n; those past the end are 0.
template <Dtype T>
__device__ __forceinline__ void load_each(const void* base, int64_t i, int64_t n, float x[kEach]) {
  const Storage<T>* from = static_cast<const Storage<T>*>(base) + i;
  if (i + kEach <= n && (reinterpret_cast<uintptr_t>(from) & 15) == 0) return load_eight<T>(from, x);
#pragma unroll
  for (int k = 0; k < kEach; ++k) x[k] = i + k < n ? number<T>(from[k]) : 0.0f;
}

// Rounded to nearest.
template <Dtype T>
__device__ __forceinline__ void store_each(void* base, int64_t i, int64_t n, const float x[kEach]) {
  Storage<T>* to = static_cast<Storage<T>*>(base) + i;
  if (i + kEach <= n && (reinterpret_cast<uintptr_t>(to) & 15) == 0) return store_eight<T>(to, x);
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (i + k < n) to[k] = rounded<T>(x[k]);
}

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
