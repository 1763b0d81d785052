// The passes over listed elements and over looked-up rows: one element per thread, with a counter of its own. A list is
// short and its weights lie far apart, so the kernel waits for memory; it reads what to do, and every dtype, as it
// runs, and so there is only one for lists and one for rows.
#include "cuda/pass.cuh"

namespace pyzo::cuda {
namespace {

// Calls run(DtypeTag<T>) for the dtype of a weight or a state.
template <class Run>
__device__ __forceinline__ auto with_dtype(Dtype dtype, const Run& run) {
  return dtype == kFloat32    ? run(DtypeTag<kFloat32>{})
         : dtype == kBFloat16 ? run(DtypeTag<kBFloat16>{})
                              : run(DtypeTag<kFloat16>{});
}

__device__ __forceinline__ float load(Dtype dtype, const void* from, int64_t i) {
  return with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
    return widen<T>(static_cast<const Storage<T>*>(from)[i]);
  });
}

// x is representable.
__device__ __forceinline__ void store(Dtype dtype, void* to, int64_t i, float x) {
  with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
    static_cast<Storage<T>*>(to)[i] = narrow<T>(x);
  });
}

__device__ __forceinline__ float add_noise_to(Dtype dtype, float w, float z, float scale) {
  return with_dtype(dtype, [&](auto t) { return add_noise<Lane, decltype(t)::value>(w, z, scale); });
}

__device__ __forceinline__ float round_update_to(Dtype dtype, bool stochastic, float v, uint32_t random) {
  return with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
    return stochastic ? round_update<Lane, T, true>(v, random) : round_update<Lane, T, false>(v, random);
  });
}

// dtype: what the new weight is rounded to.
template <int kRule>
__device__ __forceinline__ float update(const PassArgs& a, const TensorArgs& t, int64_t i, Dtype dtype, Dtype kept,
                                        float w, float g, uint32_t random) {
  constexpr int kStates = RuleOf<Lane, kRule>::type::kStates;
  float state[kMaxStates];
#pragma unroll
  for (int k = 0; k < kStates; ++k) state[k] = load(kept, t.state[k], i);
  const float v = update_element<Lane>(
      w, g, state, random, PassLanes<Lane, kRule>(a, t.row),
      [&](float x, uint32_t bits) { return round_update_to(dtype, a.stochastic, x, bits); },
      [&](float x, uint32_t bits) { return round_update_to(kept, a.stochastic, x, bits); });
#pragma unroll
  for (int k = 0; k < kStates; ++k) store(kept, t.state[k], i, state[k]);
  return v;
}

// What becomes of the weight w of element `local`, which has states and low bits at i.
__device__ __forceinline__ float pass_element(const PassArgs& a, const TensorArgs& t, const Mask& mask, int64_t local,
                                              int64_t i, Dtype dtype, Dtype kept, float w) {
  const uint64_t global = t.shard.global(local);
  const bool split = splits(a, t);
  const Parts<Lane> old = {w, split ? t.low[i] : 0u};
  const float before = split ? join<Lane>(w, old.low) : w;
  float v = before;
  if (kept1(a, t, mask, local, global, w)) {
    const Scalars<kMany, kSgd> s(a, t.row);
    const bool updated = updates(a);
    float undo[1], g[1], perturb[1];
    gather<1>(
        a, updated, s, t.row, [&](uint64_t seed, float z[1]) { z[0] = noise1(a.distribution, {seed, t.key}, global); },
        undo, g, perturb);
    if (a.undo >= 0) v = add_noise_to(dtype, v, undo[0], s.lanes.undo_scale);
    if (updated) {
      const uint32_t flip = a.retract ? 0xffffu : 0u;
      uint32_t random = 0;
      if (a.stochastic) random = bits1({s.rounding_seed, t.key}, kRoundingStream, global) ^ flip;
      const Dtype to = split ? kFloat32 : dtype;
      v = a.rule == kSign       ? update<kSign>(a, t, i, to, kept, v, g[0], random)
          : a.rule == kMomentum ? update<kMomentum>(a, t, i, to, kept, v, g[0], random)
          : a.rule == kAdam     ? update<kAdam>(a, t, i, to, kept, v, g[0], random)
                                : update<kSgd>(a, t, i, to, kept, v, g[0], random);
    }
    if (a.perturb >= 0) v = add_noise_to(dtype, v, perturb[0], s.lanes.perturb_scale);
  }
  if (!split) return Lane::if_changed(v, w);
  const Parts<Lane> parts = split_changed<Lane>(v, before, old);
  if (!a.trial) t.low[i] = uint16_t(parts.low);
  return parts.weight;
}

// Element i of the list.
__device__ __forceinline__ void pass_one(const PassArgs& a, const IndexedArgs& t, int64_t i, Dtype dtype, Dtype kept) {
  const int64_t local = t.indices[i];
  if (local < 0 || local >= t.size) return;
  const float w = t.src ? load(dtype, t.src, i) : load(dtype, t.dst, local);
  store(dtype, t.dst, local, pass_element(a, t, mask_of(a, t), local, i, dtype, kept, w));
}

// Element i of the rows.
__device__ __forceinline__ void pass_one(const PassArgs& a, const RowsArgs& t, int64_t i, Dtype dtype, Dtype kept) {
  const int64_t row = i / t.width, id = t.ids[row];
  if (id < 0 || id >= t.size) return;
  const int64_t local = i + (id - row) * t.width;
  const float w = load(dtype, t.dst, i);
  store(dtype, t.dst, i, pass_element(a, t, mask_of(a, t), local, i, dtype, kept, w));
}

template <class Tensor>
__device__ __forceinline__ void pass_each(const LaunchOf<Tensor>& launch, Dtype dtype, Dtype kept) {
  int e = 0;
  for (int64_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
    while (e + 1 < launch.count && tile >= launch.entries[e + 1].first_tile) ++e;
    const int64_t i = (tile - launch.entries[e].first_tile) * kThreads + threadIdx.x;
    if (i < launch.entries[e].tensor.n) pass_one(launch.args, launch.entries[e].tensor, i, dtype, kept);
  }
}

__global__ void __launch_bounds__(kThreads)
    pass_indexed_kernel(const __grid_constant__ IndexedLaunch launch, Dtype dtype, Dtype kept) {
  pass_each(launch, dtype, kept);
}

__global__ void __launch_bounds__(kThreads) pass_rows_kernel(const __grid_constant__ RowsLaunch launch, Dtype dtype) {
  pass_each(launch, dtype, kFloat32);
}

}  // namespace

int pass_indexed(const PassArgs& args, const IndexedArgs* tensors, size_t count, Dtype dtype, Dtype state,
                 CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  return in_launches(args, tensors, count, kThreads, [&](const IndexedLaunch& launch) -> int {
    unsigned blocks;
    if (const int error = resident_blocks(pass_indexed_kernel, known, launch.tiles, blocks)) return error;
    pass_indexed_kernel<<<blocks, kThreads, 0, stream>>>(launch, dtype, state);
    return cudaGetLastError();
  });
}

int pass_rows(const PassArgs& args, const RowsArgs* tensors, size_t count, Dtype dtype, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  return in_launches(args, tensors, count, kThreads, [&](const RowsLaunch& launch) -> int {
    unsigned blocks;
    if (const int error = resident_blocks(pass_rows_kernel, known, launch.tiles, blocks)) return error;
    pass_rows_kernel<<<blocks, kThreads, 0, stream>>>(launch, dtype);
    return cudaGetLastError();
  });
}

}  // namespace pyzo::cuda
