// Gates on CUDA. No torch.
#include "cuda/layer.cuh"

namespace pyzo::cuda {
namespace {

// The 8 elements of a thread: consecutive ones of one row.
struct Place {
  int64_t row, column;
};

__host__ __device__ inline int64_t groups_of(const GateArgs& a) { return (a.columns + kEach - 1) / kEach; }

__device__ __forceinline__ Place place(const GateArgs& a) {
  const int64_t i = int64_t(blockIdx.x) * kLayerThreads + threadIdx.x;
  if (a.rows == 1) return {0, i * kEach};
  const int64_t groups = groups_of(a);
  if ((i | groups) >> 32 == 0) {  // a 64-bit division costs more than all the rest
    const uint32_t row = uint32_t(i) / uint32_t(groups);
    return {row, int64_t(uint32_t(i) - row * uint32_t(groups)) * kEach};
  }
  return {i / groups, i % groups * kEach};
}

template <Dtype T>
__device__ __forceinline__ Storage<T>* row_at(const Rows& r, const Place& p) {
  return static_cast<Storage<T>*>(r.data) + p.row * r.stride;
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads) gate_kernel(GateArgs a, int f) {
  const Place p = place(a);
  if (p.row >= a.rows || p.column >= a.columns) return;
  float gate[kEach], up[kEach];
  load_each<T>(row_at<T>(a.gate, p), p.column, a.columns, gate);
  load_each<T>(row_at<T>(a.up, p), p.column, a.columns, up);
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) up[k] = gated<Lane, decltype(tag)::value>(gate[k], up[k]);
  });
  store_each<T>(row_at<T>(a.to_product, p), p.column, a.columns, up);
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads) gate_backward_kernel(GateArgs a, int f) {
  const Place p = place(a);
  if (p.row >= a.rows || p.column >= a.columns) return;
  float gradient[kEach], gate[kEach], up[kEach];
  load_each<T>(row_at<T>(a.gradient, p), p.column, a.columns, gradient);
  load_each<T>(row_at<T>(a.gate, p), p.column, a.columns, gate);
  load_each<T>(row_at<T>(a.up, p), p.column, a.columns, up);
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const auto g = gate_gradients<Lane, decltype(tag)::value>(gradient[k], gate[k], up[k]);
      gate[k] = g.gate, up[k] = g.up, gradient[k] = g.product;
    }
  });
  store_each<T>(row_at<T>(a.to_gate, p), p.column, a.columns, gate);
  store_each<T>(row_at<T>(a.to_up, p), p.column, a.columns, up);
  if (a.to_product.data) store_each<T>(row_at<T>(a.to_product, p), p.column, a.columns, gradient);
}

unsigned blocks_of(const GateArgs& a) { return blocks_for(a.rows * groups_of(a) * kEach); }

}  // namespace

int gate(const GateArgs& a, int f, CUstream_st* stream) {
  return launch_for(a.dtype,
                    [&](auto t) { gate_kernel<decltype(t)::value><<<blocks_of(a), kLayerThreads, 0, stream>>>(a, f); });
}

int gate_backward(const GateArgs& a, int f, CUstream_st* stream) {
  return launch_for(a.dtype, [&](auto t) {
    gate_backward_kernel<decltype(t)::value><<<blocks_of(a), kLayerThreads, 0, stream>>>(a, f);
  });
}

}  // namespace pyzo::cuda
