#pragma once
// The pass on CUDA: all tensors of a launch in one kernel, the noise in registers, 16-byte accesses. One .cu file per
// rule instantiates it. No torch.
#include "cuda/lane.cuh"
#include "cuda/launch.h"
#include "cuda/tiles.cuh"

namespace pyzo::cuda {

// What a pass does, as a template parameter: a set of these, for SGD passes in which every direction that is named is
// the same one (all passes of a step with one direction). kMany: any rule, any number of directions, masks; what to do
// is read from the arguments.
enum Kind : int { kPerturbs = 1, kUpdates = 2, kUndoes = 4, kMany = 8 };

// The scalars of one tensor in one pass, read from the control tensor when a block comes to the tensor.
template <int kKind, int kRule>
struct Scalars {
  PassLanes<Lane, kRule> lanes;
  uint64_t seed;      // of the only direction
  float coefficient;  // of the only direction
  uint64_t rounding_seed;

  __device__ Scalars(const PassArgs& a, int64_t row)
      : lanes(a, row), seed(0), coefficient(0), rounding_seed(a.control.rounding_seed()) {
    if constexpr (kKind != kMany) {
      seed = a.control.seed(kKind & kUpdates ? 0 : kKind & kUndoes ? a.undo : a.perturb);
      if (kKind & kUpdates) coefficient = a.control.coefficient(row, 0);
    }
  }
};

// Whether the mask lets an element move that has these mask bits, this bit of the packed mask and this weight.
__device__ __forceinline__ bool is_kept(const Mask& mask, uint32_t drawn, bool packed, float w) {
  return drawn < mask.keep && packed && int32_t(magnitude<Lane>(w)) <= mask.most;
}

// Bit k: whether the mask lets element k of a thread's 8 move. The mask is read here, not kept between tiles: passes
// without one have no registers for it.
template <Dtype T>
__device__ __forceinline__ uint32_t kept8(const PassArgs& a, const TensorArgs& t, const int64_t at[2],
                                          const uint64_t global[2], const float w[8]) {
  const Mask mask = mask_of(a, t);
  Bits8 drawn{};
  if (mask.keep < kKeepAll) drawn = bits8<T>({a.control.mask_seed(t.row), t.key}, kMaskStream, global);
  const uint32_t packed = mask.packed ? packed8(mask.packed, at) : 0xffu;
  uint32_t kept = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) kept |= uint32_t(is_kept(mask, drawn.at(k), packed >> k & 1, w[k])) << k;
  return kept;
}

__device__ __forceinline__ bool kept1(const PassArgs& a, const TensorArgs& t, const Mask& mask, int64_t i,
                                      uint64_t global, float w) {
  const Source source = {a.control.mask_seed(t.row), t.key};
  return is_kept(mask, mask.keep < kKeepAll ? bits1(source, kMaskStream, global) : 0u,
                 !mask.packed || mask_bit(mask.packed, i), w);
}

// The N values of a thread at once: what undo, the estimate and perturb need. sample(seed, z) writes N values of a
// direction.
template <int N, int kKind, int kRule, class Sample>
__device__ __forceinline__ void gather(const PassArgs& a, bool update, const Scalars<kKind, kRule>& s, int64_t row,
                                       const Sample& sample, float undo[N], float g[N], float perturb[N]) {
  if constexpr (kKind != kMany) {
    sample(s.seed, undo);
#pragma unroll
    for (int k = 0; k < N; ++k) perturb[k] = undo[k], g[k] = s.coefficient * undo[k];
  } else {
    if (update) {
      float z[N];
      for (int j = 0; j < a.directions; ++j) {
        sample(a.control.seed(j), z);
        const float c = a.control.coefficient(row, j);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          g[k] = j == 0 ? c * z[k] : __fmaf_rn(c, z[k], g[k]);
          if (j == a.undo) undo[k] = z[k];
        }
      }
    }
    if (a.undo >= 0 && !(update && a.undo < a.directions)) sample(a.control.seed(a.undo), undo);
    if (a.perturb >= 0) sample(a.control.seed(a.perturb), perturb);
  }
}

template <Dtype T, Dtype S, int kKind, bool kStochastic, int kRule>
__device__ __forceinline__ float element(const PassArgs& a, bool update, bool trained, const Scalars<kKind, kRule>& s,
                                         float w, float undo, float g, float perturb, uint32_t random, float* state) {
  float v = w;
  if (kKind == kMany ? a.undo >= 0 : kKind & kUndoes) v = add_noise<Lane, T>(v, undo, s.lanes.undo_scale);
  if ((kKind == kMany || kKind & kUpdates) && update && trained)
    v = update_element<Lane, T, S, kStochastic>(v, g, state, random, s.lanes);
  if (kKind == kMany ? a.perturb >= 0 : kKind & kPerturbs) v = add_noise<Lane, T>(v, perturb, s.lanes.perturb_scale);
  return Lane::if_changed(trained ? v : w, w);
}

// The same of a master and its update: nothing is undone, perturbed or rounded.
template <Dtype S, bool kStochastic, int kKind, int kRule>
__device__ __forceinline__ Parts<Lane> split_element(bool trained, const Scalars<kKind, kRule>& s,
                                                     const Parts<Lane>& old, float g, uint32_t random, float* state) {
  const float master = join<Lane>(old.weight, old.low);
  float v = master;
  if (trained) v = update_element<Lane, kFloat32, S, kStochastic>(v, g, state, random, s.lanes);
  return split_changed<Lane>(v, master, old);
}

// Blocks that must fit on a processor at once: as many as leave every kernel without spills (or nearly so), since the
// compiler, told nothing or less, takes registers for which there is no use.
template <int kKind, int kRule>
constexpr int kLeastBlocks = kKind != kMany       ? 6
                             : kRule == kMomentum ? 3
                             : kRule == kAdam     ? 2
                                                  : 4;

template <Dtype T, Dtype S, int kDistribution, bool kStochastic, int kKind, int kRule>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<kKind, kRule>)
    pass_kernel(const __grid_constant__ Launch launch) {
  constexpr int kStates = RuleOf<Lane, kRule>::type::kStates;
  constexpr bool kSplits = kKind == kMany && T == kBFloat16;  // where masters occur
  const PassArgs& a = launch.args;
  const bool update = updates(a);
  const uint32_t flip = a.retract ? 0xffffffffu : 0u;
  int e = 0;
  for (int64_t tile = blockIdx.x; tile < launch.tiles;) {
    while (e + 1 < launch.count && tile >= launch.entries[e + 1].first_tile) ++e;
    const TensorArgs& t = launch.entries[e].tensor;
    const int64_t first_tile = launch.entries[e].first_tile;
    const int64_t end = e + 1 < launch.count ? launch.entries[e + 1].first_tile : launch.tiles;
    const Scalars<kKind, kRule> s(a, t.row);
    const bool masked = kKind == kMany && !mask_of(a, t).keeps_all();
    const bool split = kSplits && splits(a, t);
    uintptr_t addresses = reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst);
#pragma unroll
    for (int i = 0; i < kStates; ++i) addresses |= reinterpret_cast<uintptr_t>(t.state[i]);
    if (split) addresses |= reinterpret_cast<uintptr_t>(t.low);
    const bool vectors = (addresses & 15) == 0 && in_blocks(t.shard);
    for (; tile < end; tile += gridDim.x) {
      const int64_t origin = (tile - first_tile) * Layout<T>::kTile;
      const int64_t at[2] = {origin + Layout<T>::group(threadIdx.x, 0), origin + Layout<T>::group(threadIdx.x, 1)};
      if (vectors && at[1] + 4 <= t.n) {
        float w[8], undo[8], g[8], perturb[8], state[8][kMaxStates];
        load8<T>(t.src, at, w);
        if (update) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            float column[8];
            load4<S>(t.state[i], at[0], column), load4<S>(t.state[i], at[1], column + 4);
#pragma unroll
            for (int k = 0; k < 8; ++k) state[k][i] = column[k];
          }
        }
        const uint64_t global[2] = {t.shard.global(at[0]),
                                    T == kFloat32 ? t.shard.global(at[1]) : t.shard.global(at[0]) + 4};
        const uint32_t kept = masked ? kept8<T>(a, t, at, global, w) : 0xffu;
        gather<8>(
            a, update, s, t.row,
            [&](uint64_t seed, float z[8]) {
              noise4<kDistribution>({seed, t.key}, global[0], z);
              noise4<kDistribution>({seed, t.key}, global[1], z + 4);
            },
            undo, g, perturb);
        Bits8 rounding{};
        if constexpr (kStochastic) {
          rounding = bits8<T>({s.rounding_seed, t.key}, kRoundingStream, global);
#pragma unroll
          for (int k = 0; k < 4; ++k) rounding.words[k] ^= flip;
        }
        if (split) {
          Bits8 low = load_bits8(t.low + at[0]);
#pragma unroll
          for (int k = 0; k < 8; ++k) {
            const Parts<Lane> parts =
                split_element<S, kStochastic>(kept >> k & 1, s, {w[k], low.at(k)}, g[k], rounding.at(k), state[k]);
            w[k] = parts.weight, low.set(k, parts.low);
          }
          if (!a.trial) store_bits8(t.low + at[0], low);
        } else {
#pragma unroll
          for (int k = 0; k < 8; ++k)
            w[k] = element<T, S, kKind, kStochastic>(a, update, kept >> k & 1, s, w[k], undo[k], g[k], perturb[k],
                                                     rounding.at(k), state[k]);
        }
        store8<T>(t.dst, at, w);
        if (update) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            float column[8];
#pragma unroll
            for (int k = 0; k < 8; ++k) column[k] = state[k][i];
            store4<S>(t.state[i], at[0], column), store4<S>(t.state[i], at[1], column + 4);
          }
        }
      } else {
#pragma unroll 1
        for (int k = 0; k < 8; ++k) {
          const int64_t i = (k < 4 ? at[0] : at[1]) + k % 4;
          if (i >= t.n) continue;
          const uint64_t global = t.shard.global(i);
          float undo[1], g[1], perturb[1], state[kMaxStates];
          gather<1>(
              a, update, s, t.row,
              [&](uint64_t seed, float z[1]) { z[0] = noise1<kDistribution>({seed, t.key}, global); }, undo, g,
              perturb);
          uint32_t random = 0;
          if constexpr (kStochastic)
            random = (bits1({s.rounding_seed, t.key}, kRoundingStream, global) ^ flip) & 0xffffu;
          if (update) {
#pragma unroll
            for (int j = 0; j < kStates; ++j) state[j] = widen<S>(static_cast<const Storage<S>*>(t.state[j])[i]);
          }
          const float w = widen<T>(static_cast<const Storage<T>*>(t.src)[i]);
          const bool trained = !masked || kept1(a, t, mask_of(a, t), i, global, w);
          float v;
          if (split) {
            const Parts<Lane> parts = split_element<S, kStochastic>(trained, s, {w, t.low[i]}, g[0], random, state);
            v = parts.weight;
            if (!a.trial) t.low[i] = uint16_t(parts.low);
          } else {
            v = element<T, S, kKind, kStochastic>(a, update, trained, s, w, undo[0], g[0], perturb[0], random, state);
          }
          static_cast<Storage<T>*>(t.dst)[i] = narrow<T>(v);
          if (update) {
#pragma unroll
            for (int j = 0; j < kStates; ++j) static_cast<Storage<S>*>(t.state[j])[i] = narrow<S>(state[j]);
          }
        }
      }
    }
  }
}

template <Dtype T, Dtype S, int kDistribution, bool kStochastic, int kKind, int kRule>
int launch_pass(const Launch& launch, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = pass_kernel<T, S, kDistribution, kStochastic, kKind, kRule>;
  if (const int error = resident_blocks(kernel, known, launch.tiles, blocks)) return error;
  kernel<<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

// Whether a launch updates masters: all of its tensors have low bits, or none has.
inline bool splits(const Launch& launch) { return launch.args.directions > 0 && launch.entries[0].tensor.low; }

// SGD passes without a mask in a step with one direction have kernels of their own; every other pass runs in the
// general one of its rule.
inline int kind_of(const PassArgs& a) {
  const int j = a.directions == 1 ? 0 : a.undo >= 0 ? a.undo : a.perturb;
  const bool one = a.directions <= 1 && (a.undo < 0 || a.undo == j) && (a.perturb < 0 || a.perturb == j);
  return one ? (a.undo >= 0 ? kUndoes : 0) | (a.directions > 0 ? kUpdates : 0) | (a.perturb >= 0 ? kPerturbs : 0)
             : kMany;
}

template <Dtype T, Dtype S, int kDistribution, bool kStochastic, int kRule>
int launch_kind(const Launch& launch, CUstream_st* stream) {
  if constexpr (kRule == kSgd) {
    const int kind = launch.args.masked || splits(launch) ? int(kMany) : kind_of(launch.args);
    if constexpr (!kStochastic) {
      switch (kind) {
        case kPerturbs:
          return launch_pass<T, S, kDistribution, false, kPerturbs, kRule>(launch, stream);
        case kUndoes:
          return launch_pass<T, S, kDistribution, false, kUndoes, kRule>(launch, stream);
        case kUndoes | kPerturbs:
          return launch_pass<T, S, kDistribution, false, kUndoes | kPerturbs, kRule>(launch, stream);
      }
    }
    switch (kind) {
      case kUpdates:
        return launch_pass<T, S, kDistribution, kStochastic, kUpdates, kRule>(launch, stream);
      case kUndoes | kUpdates:
        return launch_pass<T, S, kDistribution, kStochastic, kUndoes | kUpdates, kRule>(launch, stream);
    }
  }
  return launch_pass<T, S, kDistribution, kStochastic, kMany, kRule>(launch, stream);
}

template <Dtype T, Dtype S, int kDistribution, int kRule>
int launch_rounding(const Launch& launch, CUstream_st* stream) {
  if constexpr (T != kFloat32 || S != kFloat32) {
    const bool rounds = S != kFloat32 || !splits(launch);  // something to 16 bits
    if (launch.args.stochastic && launch.args.directions > 0 && rounds)
      return launch_kind<T, S, kDistribution, true, kRule>(launch, stream);
  }
  return launch_kind<T, S, kDistribution, false, kRule>(launch, stream);
}

template <Dtype T, Dtype S, int kRule>
int launch_distribution(const Launch& launch, CUstream_st* stream) {
  return launch.args.distribution == kNormal ? launch_rounding<T, S, kNormal, kRule>(launch, stream)
                                             : launch_rounding<T, S, kRademacher, kRule>(launch, stream);
}

template <Dtype T, int kRule>
int launch_state(const Launch& launch, Dtype state, CUstream_st* stream) {
  if constexpr (RuleOf<Lane, kRule>::type::kStates > 0) {
    if (state == kBFloat16) return launch_distribution<T, kBFloat16, kRule>(launch, stream);
  }
  return launch_distribution<T, kFloat32, kRule>(launch, stream);
}

// One launch of a rule over tensors of one weight dtype and one state dtype.
template <int kRule>
int launch_rule(const Launch& launch, Dtype dtype, Dtype state, CUstream_st* stream) {
  switch (dtype) {
    case kFloat32:
      return launch_state<kFloat32, kRule>(launch, state, stream);
    case kBFloat16:
      return launch_state<kBFloat16, kRule>(launch, state, stream);
    case kFloat16:
      return launch_state<kFloat16, kRule>(launch, state, stream);
    case kFloat64:
      break;  // no weight has it
  }
  return cudaErrorInvalidValue;
}

int pass_sgd(const Launch&, Dtype, Dtype state, CUstream_st*);
int pass_sign(const Launch&, Dtype, Dtype state, CUstream_st*);
int pass_momentum(const Launch&, Dtype, Dtype state, CUstream_st*);
int pass_adam(const Launch&, Dtype, Dtype state, CUstream_st*);

}  // namespace pyzo::cuda
