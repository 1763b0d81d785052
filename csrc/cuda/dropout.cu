// Dropout on CUDA. The seed is read by the kernel, so a CUDA graph draws anew in every replay. No torch.
#include "cuda/layer.cuh"

namespace pyzo::cuda {
namespace {

static_assert(kEach == kBitsPerCounter, "a thread's elements are those of one counter");

template <Dtype T>
__global__ void __launch_bounds__(kLayerThreads) dropout_kernel(Elements e, Dropout d, const int64_t* seed) {
  const int64_t i = first_element();
  if (i >= e.n) return;
  const uint64_t s = uint64_t(__ldg(reinterpret_cast<const long long*>(seed)));
  // Loaded as it lies in memory, and converted after the random bits: they are computed while the data is on its way.
  constexpr int kLoads = sizeof(Storage<T>) * kEach / 16;
  union {
    uint4 loaded[kLoads];
    Storage<T> element[kEach];
  } raw;
  const Storage<T>* from = static_cast<const Storage<T>*>(e.in[0]) + i;
  const bool whole = i + kEach <= e.n && (reinterpret_cast<uintptr_t>(from) & 15) == 0;
  if (whole) {
#pragma unroll
    for (int k = 0; k < kLoads; ++k) raw.loaded[k] = reinterpret_cast<const uint4*>(from)[k];
  } else {
#pragma unroll
    for (int k = 0; k < kEach; ++k) raw.element[k] = i + k < e.n ? from[k] : Storage<T>(0);
  }
  const Words<uint32_t> w = field_words<Lane>({s, 0}, kDropoutStream, uint64_t(i) / kBitsPerCounter, 0u);
  const Bits8 random = {{w.x, w.y, w.z, w.w}};
  const float scale = float(d.scale);
  float x[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) x[k] = drop<Lane>(number<T>(raw.element[k]), random.at(k), d.keep, scale);
  store_each<T>(e.out, i, e.n, x);
}

}  // namespace

int dropout(const Elements& e, const Dropout& d, const int64_t* seed, CUstream_st* stream) {
  return launch_for(e.dtype, [&](auto t) {
    dropout_kernel<decltype(t)::value><<<blocks_for(e.n), kLayerThreads, 0, stream>>>(e, d, seed);
  });
}

}  // namespace pyzo::cuda
