#pragma once
// What the kernels of norms share on CUDA: how a group of threads holds a row, moves it and sums over it. No torch.
#include <cuda_runtime.h>

#include "body/norm.h"
#include "cuda/lane.cuh"
#include "cuda/layer.cuh"

namespace pyzo::cuda {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;  // of a block

// A block is blockDim.y groups of blockDim.x threads (whole warps); a group works on a row, all groups in step.
struct Group {
  int thread, threads, warps;
  __device__ Group() : thread(threadIdx.x), threads(blockDim.x), warps(blockDim.x / kWarp) {}

  // Where a thread's element k of vector v lies in a row. Wide: 8 neighbours, for accesses of 16 bytes (rows and their
  // beginnings are multiples of 8 elements); else neighbours belong to neighbouring threads.
  template <bool kWide>
  __device__ __forceinline__ int at(int v, int k) const {
    return kWide ? (v * threads + thread) * kEach + k : (v * kEach + k) * threads + thread;
  }
};

// Sums kCount numbers over a group, the same in all its threads. Called by all threads of the block.
template <int kCount>
struct GroupSum {
  float (*part)[kMostWarps][kCount];  // two of them in turn: one barrier each
  int turn = 0;

  __device__ __forceinline__ void operator()(const Group& g, float (&x)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int apart = kWarp / 2; apart > 0; apart /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], apart);
    if (g.warps == 1) return;
    float (*mine)[kCount] = part[turn] + threadIdx.y * g.warps;
    turn ^= 1;
    if (g.thread % kWarp == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) mine[g.thread / kWarp][i] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = 0.0f;
    for (int w = 0; w < g.warps; ++w)
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] += mine[w][i];
  }
};

template <class Run>
__device__ __forceinline__ void with_dtype(Dtype dtype, const Run& run) {
  if (dtype == kFloat32)
    run(DtypeTag<kFloat32>{});
  else if (dtype == kBFloat16)
    run(DtypeTag<kBFloat16>{});
  else
    run(DtypeTag<kFloat16>{});
}

// Vectors [first, first + V) of the row that begins at element `row`; `pad` beyond its end. All loads of a call are
// under way before the first is used.
template <int V, bool kWide>
__device__ __forceinline__ void load_row(const Group& g, Dtype dtype, const void* from, int64_t row, int columns,
                                         int first, float pad, float (&x)[V][kEach]) {
  with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if constexpr (kWide) {
        const int j = g.at<true>(first + v, 0);
        if (j < columns) {
          load_eight<T>(static_cast<const Storage<T>*>(from) + row + j, x[v]);
          continue;
        }
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const int j = g.at<kWide>(first + v, k);
        x[v][k] = pad;
        if (!kWide && j < columns) x[v][k] = number<T>(static_cast<const Storage<T>*>(from)[row + j]);
      }
    }
  });
}

// Rounded to nearest.
template <int V, bool kWide>
__device__ __forceinline__ void store_row(const Group& g, Dtype dtype, void* to, int64_t row, int columns, int first,
                                          float (&x)[V][kEach]) {
  with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if constexpr (kWide) {
        const int j = g.at<true>(first + v, 0);
        if (j < columns) store_eight<T>(static_cast<Storage<T>*>(to) + row + j, x[v]);
      } else {
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
          const int j = g.at<false>(first + v, k);
          if (j < columns) static_cast<Storage<T>*>(to)[row + j] = rounded<T>(x[v][k]);
        }
      }
    }
  });
}

// gamma and beta of the same elements; 1 and 0 beyond the row and without parameters.
template <int V, bool kWide>
__device__ __forceinline__ void load_gamma(const Group& g, const NormArgs& a, int first, float (&gamma)[V][kEach]) {
  if (a.weight)
    load_row<V, kWide>(g, a.weight_dtype, a.weight, 0, int(a.columns), first, 1.0f - float(a.offset), gamma);
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int k = 0; k < kEach; ++k) gamma[v][k] = a.weight ? float(a.offset) + gamma[v][k] : 1.0f;
}
template <int V, bool kWide>
__device__ __forceinline__ void load_beta(const Group& g, const NormArgs& a, int first, float (&beta)[V][kEach]) {
  if (a.bias) return load_row<V, kWide>(g, a.bias_dtype, a.bias, 0, int(a.columns), first, 0.0f, beta);
#pragma unroll
  for (int v = 0; v < V; ++v)
#pragma unroll
    for (int k = 0; k < kEach; ++k) beta[v][k] = 0.0f;
}

}  // namespace pyzo::cuda
