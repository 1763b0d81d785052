// Activations on CUDA: values, exact derivatives, and codes. No torch.
#include "cuda/layer.cuh"

namespace pyzo::cuda {
namespace {

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads) activation_kernel(Elements e, int f) {
  const int64_t i = first_element();
  if (i >= e.n) return;
  float x[kEach];
  load_each<T>(e.in[0], i, e.n, x);
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[k] = function<Lane, decltype(tag)::value>(x[k]).value;
  });
  store_each<T>(e.out, i, e.n, x);
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads) activation_backward_kernel(Elements e, int f) {
  const int64_t i = first_element();
  if (i >= e.n) return;
  float gradient[kEach], x[kEach];
  load_each<T>(e.in[0], i, e.n, gradient);
  load_each<T>(e.in[1], i, e.n, x);
  const bool valued = e.value != nullptr;
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const ValueSlope<float> h = function<Lane, decltype(tag)::value>(x[k]);
      x[k] = gradient[k] * h.slope;
      if (valued) gradient[k] = h.value;
    }
  });
  store_each<T>(e.out, i, e.n, x);
  if (valued) store_each<T>(e.value, i, e.n, gradient);
}

// The codes of a thread's 8 elements are `bits` bytes, the first element's in the lowest bits. Wide accesses are for
// whole ones of 2 or 4 bytes alone: 2 bytes that are left of 3 may lie at an odd address.
__device__ __forceinline__ void store_codes(uint8_t* codes, int64_t i, int64_t n, int bits, uint32_t word) {
  uint8_t* at = codes + i / kEach * bits;
  const bool whole = i + kEach <= n;
  const int64_t bytes = whole ? bits : code_bytes(n - i, bits);
  if (whole && bits == 2)
    *reinterpret_cast<uint16_t*>(at) = uint16_t(word);
  else if (whole && bits == 4)
    *reinterpret_cast<uint32_t*>(at) = word;
  else
    for (int b = 0; b < bytes; ++b) at[b] = uint8_t(word >> (8 * b));
}

__device__ __forceinline__ uint32_t load_codes(const uint8_t* codes, int64_t i, int64_t n, int bits) {
  const uint8_t* at = codes + i / kEach * bits;
  const bool whole = i + kEach <= n;
  const int64_t bytes = whole ? bits : code_bytes(n - i, bits);
  if (whole && bits == 2) return *reinterpret_cast<const uint16_t*>(at);
  if (whole && bits == 4) return *reinterpret_cast<const uint32_t*>(at);
  uint32_t word = 0;
  for (int b = 0; b < bytes; ++b) word |= uint32_t(at[b]) << (8 * b);
  return word;
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads)
    coded_activation_kernel(Elements e, int f, Levels thresholds, uint8_t* codes) {
  const int64_t i = first_element();
  if (i >= e.n) return;
  float x[kEach];
  load_each<T>(e.in[0], i, e.n, x);
  uint32_t word = 0;
  for (int t = 0; t < (1 << thresholds.bits) - 1; ++t) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) word += Lane::above(x[k], thresholds.level[t]) << (k * thresholds.bits);
  }
  if (i + kEach > e.n) word &= (1u << ((e.n - i) * thresholds.bits)) - 1u;
  store_codes(codes, i, e.n, thresholds.bits, word);
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[k] = function<Lane, decltype(tag)::value>(x[k]).value;
  });
  store_each<T>(e.out, i, e.n, x);
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads)
    coded_activation_backward_kernel(Elements e, Levels slopes, const uint8_t* codes) {
  __shared__ float level[1 << kMaxBits];  // lanes read different entries, which constant memory would serve in turn
  if (threadIdx.x < 1 << kMaxBits) level[threadIdx.x] = slopes.level[threadIdx.x];
  __syncthreads();
  const int64_t i = first_element();
  if (i >= e.n) return;
  float gradient[kEach];
  load_each<T>(e.in[0], i, e.n, gradient);
  const uint32_t word = load_codes(codes, i, e.n, slopes.bits), mask = (1u << slopes.bits) - 1u;
#pragma unroll
  for (int k = 0; k < kEach; ++k) gradient[k] *= level[(word >> (k * slopes.bits)) & mask];
  store_each<T>(e.out, i, e.n, gradient);
}

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads)
    output_activation_backward_kernel(Elements e, int f, const uint8_t* sides) {
  const int64_t i = first_element();
  if (i >= e.n) return;
  float gradient[kEach], y[kEach];
  load_each<T>(e.in[0], i, e.n, gradient);
  load_each<T>(e.in[1], i, e.n, y);
  const uint32_t right = has_sides(f) ? sides[i / kEach] : 0u;
  with_function(f, [&](auto tag) {
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      y[k] = gradient[k] * slope_of_output<Lane, decltype(tag)::value>(y[k], (right >> k) & 1u ? 1.0f : -1.0f);
  });
  store_each<T>(e.out, i, e.n, y);
}

}  // namespace

int activation(const Elements& e, int f, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    activation_kernel<decltype(t)::value><<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, f);
  });
}

int activation_backward(const Elements& e, int f, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    activation_backward_kernel<decltype(t)::value><<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, f);
  });
}

int coded_activation(const Elements& e, int f, const Levels& thresholds, uint8_t* codes, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    coded_activation_kernel<decltype(t)::value><<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, f, thresholds, codes);
  });
}

int coded_activation_backward(const Elements& e, const Levels& slopes, const uint8_t* codes, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    coded_activation_backward_kernel<decltype(t)::value>
        <<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, slopes, codes);
  });
}

int output_activation_backward(const Elements& e, int f, const uint8_t* sides, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    output_activation_backward_kernel<decltype(t)::value><<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, f, sides);
  });
}

}  // namespace pyzo::cuda
