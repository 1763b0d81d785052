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

// The scalars and seeds of a pass for one tensor, read from the control tensor.
template <bool kOne>
struct Directions {
  const PassArgs& a;
  bool update;
  uint64_t seed;  // of the only direction, where kOne
  float c;

  __device__ Directions(const PassArgs& args, int64_t row) : a(args), update(updates(args)), seed(0), c(0) {
    if constexpr (kOne) {
      const int j = a.directions > 0 ? 0 : a.undo >= 0 ? a.undo : a.perturb;
      if (j >= 0) seed = a.control.seed(j);
      if (update) c = a.control.coefficient(row, 0);
    }
  }
};

// One value for each of the N elements a thread works on at once: what undo, the estimate and perturb need. `sample` writes N
// values of a direction's noise. kOne: every direction that the pass names is the same one.
template <int N, bool kOne, class Sample>
__device__ __forceinline__ void gather(const Directions<kOne>& d, int64_t row, const Sample& sample, float undo[N], float g[N],
                                       float perturb[N]) {
  const PassArgs& a = d.a;
  if constexpr (kOne) {
    sample(d.seed, undo);
#pragma unroll
    for (int k = 0; k < N; ++k) perturb[k] = undo[k], g[k] = d.c * undo[k];
  } else {
    if (d.update) {
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
    if (a.undo >= 0 && !(d.update && a.undo < a.directions)) sample(a.control.seed(a.undo), undo);
    if (a.perturb >= 0) sample(a.control.seed(a.perturb), perturb);
  }
}

template <Dtype T, bool kStochastic>
__device__ __forceinline__ float element(const PassArgs& a, bool update, const PassLanes<Lane>& s, float w, float undo, float g,
                                         float perturb, uint32_t random) {
  float v = w;
  if (a.undo >= 0) v = pass_element<Lane, T, true, false, false, false>(v, undo, 0.0f, 0.0f, 0u, s);
  if (update) v = pass_element<Lane, T, false, true, false, kStochastic>(v, 0.0f, g, 0.0f, random, s);
  if (a.perturb >= 0) v = pass_element<Lane, T, false, false, true, false>(v, 0.0f, 0.0f, perturb, 0u, s);
  return Lane::if_changed(v, w);
}

template <Dtype T, int kDistribution, bool kStochastic, bool kOne>
__global__ void __launch_bounds__(kThreads) pass_kernel(const __grid_constant__ Launch launch) {
  const PassArgs& a = launch.args;
  const bool update = updates(a);
  int e = 0;
  for (int64_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
    while (e + 1 < launch.count && tile >= launch.entries[e + 1].first_tile) ++e;
    const TensorArgs& t = launch.entries[e].tensor;
    const PassLanes<Lane> scalars{PassScalars(a, t.row)};
    const Directions<kOne> directions(a, t.row);
    const int64_t origin = (tile - launch.entries[e].first_tile) * Layout<T>::kTile;
    const int64_t at[2] = {origin + Layout<T>::group(threadIdx.x, 0), origin + Layout<T>::group(threadIdx.x, 1)};
    const bool aligned = ((reinterpret_cast<uintptr_t>(t.src) | reinterpret_cast<uintptr_t>(t.dst)) & 15) == 0;
    if (aligned && in_blocks(t.shard) && at[1] + 4 <= t.n) {
      float w[8], undo[8], g[8], perturb[8];
      load8<T>(t.src, at, w);
      const uint64_t global[2] = {t.shard.global(at[0]), T == kFloat32 ? t.shard.global(at[1]) : t.shard.global(at[0]) + 4};
      gather<8, kOne>(
          directions, t.row,
          [&](uint64_t seed, float z[8]) {
            noise4<kDistribution>({seed, t.key}, global[0], z);
            noise4<kDistribution>({seed, t.key}, global[1], z + 4);
          },
          undo, g, perturb);
      Words<uint32_t> random{};
      if constexpr (kStochastic) {
        if (update) random = field_words<Lane>({a.control.rounding_seed(), t.key}, kRoundingStream, global[0] / kRoundingPerCounter, 0u);
      }
#pragma unroll
      for (int k = 0; k < 8; ++k)
        w[k] = element<T, kStochastic>(a, update, scalars, w[k], undo[k], g[k], perturb[k], half_of(random, k));
      store8<T>(t.dst, at, w);
    } else {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        const int64_t i = at[k / 4] + k % 4;
        if (i >= t.n) continue;
        const uint64_t global = t.shard.global(i);
        float undo[1], g[1], perturb[1];
        gather<1, kOne>(
            directions, t.row, [&](uint64_t seed, float z[1]) { z[0] = noise1<kDistribution>({seed, t.key}, global); }, undo, g, perturb);
        uint32_t random = 0;
        if constexpr (kStochastic) {
          if (update)
            random = half_of(field_words<Lane>({a.control.rounding_seed(), t.key}, kRoundingStream, global / kRoundingPerCounter, 0u),
                             int(global % kRoundingPerCounter));
        }
        const float w = widen<T>(static_cast<const Storage<T>*>(t.src)[i]);
        static_cast<Storage<T>*>(t.dst)[i] =
            narrow<T>(element<T, kStochastic>(a, update, scalars, w, undo[0], g[0], perturb[0], random));
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
        if (i < n) static_cast<Storage<T>*>(out)[i] = narrow<T>(to_storage<Lane, T>(noise1<kDistribution>(s, shard.global(i))));
      }
    }
  }
}

__global__ void philox_kernel(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads)
    philox_at(out + 4 * i, seed, high, block + uint64_t(i));
}

__global__ void begin_step_kernel(Control c) { pyzo::begin_step(c); }

__global__ void estimate_two_sided_kernel(Control c, const double* losses, int64_t q) { pyzo::estimate_two_sided(c, losses, q); }

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

template <Dtype T, int kDistribution, bool kStochastic, bool kOne>
int launch_pass(const Launch& launch, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = pass_kernel<T, kDistribution, kStochastic, kOne>;
  if (const int error = resident_blocks(kernel, known, launch.tiles, blocks)) return error;
  kernel<<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

template <Dtype T, int kDistribution, bool kStochastic>
int launch_directions(bool one, const Launch& launch, CUstream_st* stream) {
  return one ? launch_pass<T, kDistribution, kStochastic, true>(launch, stream)
             : launch_pass<T, kDistribution, kStochastic, false>(launch, stream);
}

template <Dtype T, int kDistribution>
int launch_rounding(bool one, const Launch& launch, CUstream_st* stream) {
  if constexpr (T != kFloat32) {
    if (launch.args.stochastic && launch.args.directions > 0) return launch_directions<T, kDistribution, true>(one, launch, stream);
  }
  return launch_directions<T, kDistribution, false>(one, launch, stream);
}

template <Dtype T>
int launch_distribution(bool one, const Launch& launch, CUstream_st* stream) {
  return launch.args.distribution == kNormal ? launch_rounding<T, kNormal>(one, launch, stream)
                                             : launch_rounding<T, kRademacher>(one, launch, stream);
}

template <Dtype T, int kDistribution>
int launch_noise(Source s, Shard shard, void* out, int64_t n, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = noise_kernel<T, kDistribution>;
  if (const int error = resident_blocks(kernel, known, (n + Layout<T>::kTile - 1) / Layout<T>::kTile, blocks)) return error;
  kernel<<<blocks, kThreads, 0, stream>>>(s, shard, out, n);
  return cudaGetLastError();
}

// Every direction that the pass names is the same one (and it is direction 0 where the pass updates).
bool names_one(const PassArgs& a) {
  if (a.directions > 1) return false;
  const int j = a.directions == 1 ? 0 : a.undo >= 0 ? a.undo : a.perturb;
  return (a.undo < 0 || a.undo == j) && (a.perturb < 0 || a.perturb == j);
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
    const bool one = names_one(args);
    const int error = dtype == kFloat32    ? launch_distribution<kFloat32>(one, launch, stream)
                      : dtype == kBFloat16 ? launch_distribution<kBFloat16>(one, launch, stream)
                                           : launch_distribution<kFloat16>(one, launch, stream);
    if (error) return error;
  }
  return 0;
}

int noise(Source s, Shard shard, int distribution, Dtype dtype, void* out, int64_t n, CUstream_st* stream) {
  const bool normal = distribution == kNormal;
  switch (dtype) {
    case kFloat32: return normal ? launch_noise<kFloat32, kNormal>(s, shard, out, n, stream) : launch_noise<kFloat32, kRademacher>(s, shard, out, n, stream);
    case kBFloat16: return normal ? launch_noise<kBFloat16, kNormal>(s, shard, out, n, stream) : launch_noise<kBFloat16, kRademacher>(s, shard, out, n, stream);
    case kFloat16: return normal ? launch_noise<kFloat16, kNormal>(s, shard, out, n, stream) : launch_noise<kFloat16, kRademacher>(s, shard, out, n, stream);
  }
  return cudaErrorInvalidValue;
}

int philox(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block, CUstream_st* stream) {
  philox_kernel<<<unsigned(std::min<int64_t>((n + kThreads - 1) / kThreads, 65535)), kThreads, 0, stream>>>(out, n, seed, high, block);
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
