// The CUDA driver: all tensors of a pass in one launch, the noise in registers, 16-byte accesses. No torch.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "cuda/lane.cuh"
#include "cuda/launch.h"

namespace pyzo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxDevices = 64;

struct Entry {
  TensorArgs tensor;
  int64_t first_tile;
};

// Kernel parameters may take 32,764 bytes: as many tensors as fit go into one launch.
constexpr int kMaxEntries = (32764 - int(sizeof(PassArgs)) - 16) / int(sizeof(Entry));

struct Launch {
  PassArgs args;
  int64_t tiles;
  int count;
  Entry entries[kMaxEntries];
};
static_assert(sizeof(Launch) <= 32764);

// What a pass does, as a template parameter: a set of these, for passes in which every direction that is named is the
// same one (all passes of a step with one direction). kMany: any number of directions, what to do is read from the
// arguments.
enum Kind : int { kPerturbs = 1, kUpdates = 2, kUndoes = 4, kMany = 8 };

// The scalars of one tensor in one pass, read from the control tensor when a block comes to the tensor.
template <int kKind>
struct Scalars {
  PassLanes<Lane> lanes;
  uint64_t seed;      // of the only direction
  float coefficient;  // of the only direction
  uint64_t rounding_seed;

  __device__ Scalars(const PassArgs& a, int64_t row)
      : lanes(PassScalars(a, row)), seed(0), coefficient(0), rounding_seed(a.control.rounding_seed()) {
    if constexpr (kKind != kMany) {
      seed = a.control.seed(kKind & kUpdates ? 0 : kKind & kUndoes ? a.undo : a.perturb);
      if (kKind & kUpdates) coefficient = a.control.coefficient(row, 0);
    }
  }
};

// The N values of a thread at once: what undo, the estimate and perturb need. sample(seed, z) writes N values of a
// direction.
template <int N, int kKind, class Sample>
__device__ __forceinline__ void gather(const PassArgs& a, bool update, const Scalars<kKind>& s, int64_t row,
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

template <Dtype T, int kKind, bool kStochastic>
__device__ __forceinline__ float element(const PassArgs& a, bool update, const PassLanes<Lane>& s, float w, float undo,
                                         float g, float perturb, uint32_t random) {
  float v = w;
  if (kKind == kMany ? a.undo >= 0 : kKind & kUndoes) v = add_noise<Lane, T>(v, undo, s.undo_scale);
  if (kKind == kMany || kKind & kUpdates) {
    const float updated = update_element<Lane, T, kStochastic>(v, g, random, s);
    v = update ? updated : v;
  }
  if (kKind == kMany ? a.perturb >= 0 : kKind & kPerturbs) v = add_noise<Lane, T>(v, perturb, s.perturb_scale);
  return Lane::if_changed(v, w);
}

template <Dtype T, int kDistribution, bool kStochastic, int kKind>
__global__ void __launch_bounds__(kThreads) pass_kernel(const __grid_constant__ Launch launch) {
  const PassArgs& a = launch.args;
  const bool update = updates(a);
  int e = 0;
  for (int64_t tile = blockIdx.x; tile < launch.tiles;) {
    while (e + 1 < launch.count && tile >= launch.entries[e + 1].first_tile) ++e;
    const TensorArgs& t = launch.entries[e].tensor;
    const int64_t first_tile = launch.entries[e].first_tile;
    const int64_t end = e + 1 < launch.count ? launch.entries[e + 1].first_tile : launch.tiles;
    const Scalars<kKind> s(a, t.row);
    const bool vectors =
        ((reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst)) & 15) == 0 && in_blocks(t.shard);
    for (; tile < end; tile += gridDim.x) {
      const int64_t origin = (tile - first_tile) * Layout<T>::kTile;
      const int64_t at[2] = {origin + Layout<T>::group(threadIdx.x, 0), origin + Layout<T>::group(threadIdx.x, 1)};
      if (vectors && at[1] + 4 <= t.n) {
        float w[8], undo[8], g[8], perturb[8];
        load8<T>(t.src, at, w);
        const uint64_t global[2] = {t.shard.global(at[0]),
                                    T == kFloat32 ? t.shard.global(at[1]) : t.shard.global(at[0]) + 4};
        gather<8, kKind>(
            a, update, s, t.row,
            [&](uint64_t seed, float z[8]) {
              noise4<kDistribution>({seed, t.key}, global[0], z);
              noise4<kDistribution>({seed, t.key}, global[1], z + 4);
            },
            undo, g, perturb);
        Words<uint32_t> random{};
        if constexpr (kStochastic)
          random = field_words<Lane>({s.rounding_seed, t.key}, kRoundingStream, global[0] / kRoundingPerCounter, 0u);
#pragma unroll
        for (int k = 0; k < 8; ++k)
          w[k] =
              element<T, kKind, kStochastic>(a, update, s.lanes, w[k], undo[k], g[k], perturb[k], half_of(random, k));
        store8<T>(t.dst, at, w);
      } else {
#pragma unroll 1
        for (int k = 0; k < 8; ++k) {
          const int64_t i = (k < 4 ? at[0] : at[1]) + k % 4;
          if (i >= t.n) continue;
          const uint64_t global = t.shard.global(i);
          float undo[1], g[1], perturb[1];
          gather<1, kKind>(
              a, update, s, t.row,
              [&](uint64_t seed, float z[1]) { z[0] = noise1<kDistribution>({seed, t.key}, global); }, undo, g,
              perturb);
          uint32_t random = 0;
          if constexpr (kStochastic)
            random =
                half_of(field_words<Lane>({s.rounding_seed, t.key}, kRoundingStream, global / kRoundingPerCounter, 0u),
                        int(global % kRoundingPerCounter));
          const float w = widen<T>(static_cast<const Storage<T>*>(t.src)[i]);
          static_cast<Storage<T>*>(t.dst)[i] =
              narrow<T>(element<T, kKind, kStochastic>(a, update, s.lanes, w, undo[0], g[0], perturb[0], random));
        }
      }
    }
  }
}

template <Dtype T, int kDistribution>
__global__ void __launch_bounds__(kThreads) noise_kernel(Source s, Shard shard, void* out, int64_t n) {
  const int64_t tiles = (n + Layout<T>::kTile - 1) / Layout<T>::kTile;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) & 15) == 0 && in_blocks(shard);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t origin = tile * Layout<T>::kTile;
    const int64_t at[2] = {origin + Layout<T>::group(threadIdx.x, 0), origin + Layout<T>::group(threadIdx.x, 1)};
    if (aligned && at[1] + 4 <= n) {
      float z[8];
      noise4<kDistribution>(s, shard.global(at[0]), z);
      noise4<kDistribution>(s, shard.global(at[1]), z + 4);
#pragma unroll
      for (int k = 0; k < 8; ++k) z[k] = to_storage<Lane, T>(z[k]);
      store8<T>(out, at, z);
    } else {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        const int64_t i = at[k / 4] + k % 4;
        if (i < n)
          static_cast<Storage<T>*>(out)[i] = narrow<T>(to_storage<Lane, T>(noise1<kDistribution>(s, shard.global(i))));
      }
    }
  }
}

__global__ void philox_kernel(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads)
    philox_at(out + 4 * i, seed, high, block + uint64_t(i));
}

__global__ void begin_step_kernel(Control c) { pyzo::begin_step(c); }

__global__ void estimate_two_sided_kernel(Control c, const double* losses, int64_t q) {
  pyzo::estimate_two_sided(c, losses, q);
}

// Blocks that fill the current device with this kernel, remembered per device.
template <class Kernel>
int resident_blocks(Kernel kernel, std::atomic<int>* known, int64_t tiles, unsigned& blocks) {
  int device = 0, error = cudaGetDevice(&device);
  if (error) return error;
  int resident = device < kMaxDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (resident == 0) {
    int processors = 0, per_processor = 0;
    if ((error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device))) return error;
    if ((error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, 0))) return error;
    resident = std::max(1, processors * per_processor);
    if (device < kMaxDevices) known[device].store(resident, std::memory_order_relaxed);
  }
  blocks = unsigned(std::min<int64_t>(tiles, resident));
  return 0;
}

template <Dtype T, int kDistribution, bool kStochastic, int kKind>
int launch_pass(const Launch& launch, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = pass_kernel<T, kDistribution, kStochastic, kKind>;
  if (const int error = resident_blocks(kernel, known, launch.tiles, blocks)) return error;
  kernel<<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

// The passes of a step with one direction have kernels of their own; every other pass runs in the general one.
int kind_of(const PassArgs& a) {
  const int j = a.directions == 1 ? 0 : a.undo >= 0 ? a.undo : a.perturb;
  const bool one = a.directions <= 1 && (a.undo < 0 || a.undo == j) && (a.perturb < 0 || a.perturb == j);
  return one ? (a.undo >= 0 ? kUndoes : 0) | (a.directions > 0 ? kUpdates : 0) | (a.perturb >= 0 ? kPerturbs : 0)
             : kMany;
}

template <Dtype T, int kDistribution, bool kStochastic>
int launch_kind(const Launch& launch, CUstream_st* stream) {
  const int kind = kind_of(launch.args);
  if constexpr (!kStochastic) {
    switch (kind) {
      case kPerturbs:
        return launch_pass<T, kDistribution, false, kPerturbs>(launch, stream);
      case kUndoes:
        return launch_pass<T, kDistribution, false, kUndoes>(launch, stream);
      case kUndoes | kPerturbs:
        return launch_pass<T, kDistribution, false, kUndoes | kPerturbs>(launch, stream);
    }
  }
  switch (kind) {
    case kUpdates:
      return launch_pass<T, kDistribution, kStochastic, kUpdates>(launch, stream);
    case kUndoes | kUpdates:
      return launch_pass<T, kDistribution, kStochastic, kUndoes | kUpdates>(launch, stream);
  }
  return launch_pass<T, kDistribution, kStochastic, kMany>(launch, stream);
}

template <Dtype T, int kDistribution>
int launch_rounding(const Launch& launch, CUstream_st* stream) {
  if constexpr (T != kFloat32) {
    if (launch.args.stochastic && launch.args.directions > 0)
      return launch_kind<T, kDistribution, true>(launch, stream);
  }
  return launch_kind<T, kDistribution, false>(launch, stream);
}

template <Dtype T>
int launch_distribution(const Launch& launch, CUstream_st* stream) {
  return launch.args.distribution == kNormal ? launch_rounding<T, kNormal>(launch, stream)
                                             : launch_rounding<T, kRademacher>(launch, stream);
}

template <Dtype T, int kDistribution>
int launch_noise(Source s, Shard shard, void* out, int64_t n, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = noise_kernel<T, kDistribution>;
  if (const int error = resident_blocks(kernel, known, (n + Layout<T>::kTile - 1) / Layout<T>::kTile, blocks))
    return error;
  kernel<<<blocks, kThreads, 0, stream>>>(s, shard, out, n);
  return cudaGetLastError();
}

}  // namespace

int pass(const PassArgs& args, const TensorArgs* tensors, size_t count, Dtype dtype, CUstream_st* stream) {
  static_assert(Layout<kFloat32>::kTile == Layout<kFloat16>::kTile);
  Launch launch;
  launch.args = args;
  for (size_t begin = 0; begin < count; begin += kMaxEntries) {
    launch.count = int(std::min<size_t>(count - begin, kMaxEntries));
    launch.tiles = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.entries[i] = {tensors[begin + size_t(i)], launch.tiles};
      launch.tiles += (tensors[begin + size_t(i)].n + Layout<kFloat32>::kTile - 1) / Layout<kFloat32>::kTile;
    }
    const int error = dtype == kFloat32    ? launch_distribution<kFloat32>(launch, stream)
                      : dtype == kBFloat16 ? launch_distribution<kBFloat16>(launch, stream)
                                           : launch_distribution<kFloat16>(launch, stream);
    if (error) return error;
  }
  return 0;
}

int noise(Source s, Shard shard, int distribution, Dtype dtype, void* out, int64_t n, CUstream_st* stream) {
  const bool normal = distribution == kNormal;
  switch (dtype) {
    case kFloat32:
      return normal ? launch_noise<kFloat32, kNormal>(s, shard, out, n, stream)
                    : launch_noise<kFloat32, kRademacher>(s, shard, out, n, stream);
    case kBFloat16:
      return normal ? launch_noise<kBFloat16, kNormal>(s, shard, out, n, stream)
                    : launch_noise<kBFloat16, kRademacher>(s, shard, out, n, stream);
    case kFloat16:
      return normal ? launch_noise<kFloat16, kNormal>(s, shard, out, n, stream)
                    : launch_noise<kFloat16, kRademacher>(s, shard, out, n, stream);
  }
  return cudaErrorInvalidValue;
}

int philox(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block, CUstream_st* stream) {
  philox_kernel<<<unsigned(std::min<int64_t>((n + kThreads - 1) / kThreads, 65535)), kThreads, 0, stream>>>(
      out, n, seed, high, block);
  return cudaGetLastError();
}

int begin_step(Control c, CUstream_st* stream) {
  begin_step_kernel<<<1, 1, 0, stream>>>(c);
  return cudaGetLastError();
}

int estimate_two_sided(Control c, const double* losses, int64_t q, CUstream_st* stream) {
  estimate_two_sided_kernel<<<1, 1, 0, stream>>>(c, losses, q);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace pyzo::cuda
