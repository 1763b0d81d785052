// The CUDA driver: cuts a pass into launches; the kernels that fill noise, pack masks and keep the control tensor. No
// torch.
#include "cuda/pass.cuh"

namespace pyzo::cuda {
namespace {

template <Dtype T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(Source s, Shard shard, int distribution, void* out, int64_t n) {
  const int64_t tiles = (n + Layout<T>::kTile - 1) / Layout<T>::kTile;
  const bool aligned = (reinterpret_cast<uintptr_t>(out) & 15) == 0 && in_blocks(shard);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t origin = tile * Layout<T>::kTile;
    const int64_t at[2] = {origin + Layout<T>::group(threadIdx.x, 0), origin + Layout<T>::group(threadIdx.x, 1)};
    if (aligned && at[1] + 4 <= n) {
      float z[8];
      noise4(distribution, s, shard.global(at[0]), z);
      noise4(distribution, s, shard.global(at[1]), z + 4);
#pragma unroll
      for (int k = 0; k < 8; ++k) z[k] = to_storage<Lane, T>(z[k]);
      store8<T>(out, at, z);
    } else {
#pragma unroll 1
      for (int k = 0; k < 8; ++k) {
        const int64_t i = at[k / 4] + k % 4;
        if (i < n)
          static_cast<Storage<T>*>(out)[i] = narrow<T>(to_storage<Lane, T>(noise1(distribution, s, shard.global(i))));
      }
    }
  }
}

// The packed mask of 8 elements from i on, of which `count` are there.
template <Dtype T>
__device__ __forceinline__ uint32_t small8(const void* weights, int64_t i, int64_t count, int32_t most) {
  uint32_t packed = 0;
  if (count == 8 && (reinterpret_cast<uintptr_t>(weights) & 15) == 0) {
    const int64_t at[2] = {i, i + 4};
    float w[8];
    load8<T>(weights, at, w);
#pragma unroll
    for (int k = 0; k < 8; ++k) packed |= uint32_t(int32_t(magnitude<Lane>(w[k])) <= most) << k;
  } else {
    for (int k = 0; k < count; ++k) {
      const float w = widen<T>(static_cast<const Storage<T>*>(weights)[i + k]);
      packed |= uint32_t(int32_t(magnitude<Lane>(w)) <= most) << k;
    }
  }
  return packed;
}

// A byte of a mask for each thread; weights are the sources, masks the destinations of the launch.
__global__ void __launch_bounds__(kThreads) mask_bits_kernel(const __grid_constant__ Launch launch, Dtype dtype) {
  int e = 0;
  for (int64_t tile = blockIdx.x; tile < launch.tiles; tile += gridDim.x) {
    while (e + 1 < launch.count && tile >= launch.entries[e + 1].first_tile) ++e;
    const TensorArgs& t = launch.entries[e].tensor;
    const int64_t i = ((tile - launch.entries[e].first_tile) * kThreads + threadIdx.x) * 8;
    if (i >= t.n) continue;
    const int64_t count = t.n - i < 8 ? t.n - i : 8;
    const int32_t most = largest_kept(launch.args.control.threshold(t.row));
    const uint32_t packed = dtype == kFloat32    ? small8<kFloat32>(t.src, i, count, most)
                            : dtype == kBFloat16 ? small8<kBFloat16>(t.src, i, count, most)
                                                 : small8<kFloat16>(t.src, i, count, most);
    static_cast<uint8_t*>(t.dst)[i / 8] = uint8_t(packed);
  }
}

__global__ void philox_kernel(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block) {
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads)
    philox_at(out + 4 * i, seed, high, block + uint64_t(i));
}

__global__ void begin_step_kernel(Control c) { pyzo::begin_step(c); }

__global__ void estimate_kernel(Control c, const double* losses, int64_t count, int kind, int64_t q, int scaling) {
  pyzo::estimate(c, losses, count, kind, q, scaling);
}

__global__ void choose_kernel(Control c, const double* losses) { pyzo::choose(c, losses); }

template <Dtype T>
int launch_noise(Source s, Shard shard, int distribution, void* out, int64_t n, CUstream_st* stream) {
  static std::atomic<int> known[kMaxDevices];
  unsigned blocks;
  const auto kernel = noise_kernel<T>;
  if (const int error = resident_blocks(kernel, known, (n + Layout<T>::kTile - 1) / Layout<T>::kTile, blocks))
    return error;
  kernel<<<blocks, kThreads, 0, stream>>>(s, shard, distribution, out, n);
  return cudaGetLastError();
}

// Cuts the tensors into launches, run(launch) -> error each.
template <class Run>
int in_launches(const PassArgs& args, const TensorArgs* tensors, size_t count, const Run& run) {
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
    if (const int error = run(launch)) return error;
  }
  return 0;
}

}  // namespace

int pass(const PassArgs& args, const TensorArgs* tensors, size_t count, Dtype dtype, Dtype state, CUstream_st* stream) {
  const auto launch_of = args.directions == 0     ? pass_sgd
                         : args.rule == kSign     ? pass_sign
                         : args.rule == kMomentum ? pass_momentum
                         : args.rule == kAdam     ? pass_adam
                                                  : pass_sgd;
  return in_launches(args, tensors, count,
                     [&](const Launch& launch) { return launch_of(launch, dtype, state, stream); });
}

int mask_bits(Control control, const TensorArgs* tensors, size_t count, Dtype dtype, CUstream_st* stream) {
  static_assert(Layout<kFloat32>::kTile == kThreads * 8);
  static std::atomic<int> known[kMaxDevices];
  PassArgs args = {};
  args.control = control;
  return in_launches(args, tensors, count, [&](const Launch& launch) -> int {
    unsigned blocks;
    if (const int error = resident_blocks(mask_bits_kernel, known, launch.tiles, blocks)) return error;
    mask_bits_kernel<<<blocks, kThreads, 0, stream>>>(launch, dtype);
    return cudaGetLastError();
  });
}

int noise(Source s, Shard shard, int distribution, Dtype dtype, void* out, int64_t n, CUstream_st* stream) {
  switch (dtype) {
    case kFloat32:
      return launch_noise<kFloat32>(s, shard, distribution, out, n, stream);
    case kBFloat16:
      return launch_noise<kBFloat16>(s, shard, distribution, out, n, stream);
    case kFloat16:
      return launch_noise<kFloat16>(s, shard, distribution, out, n, stream);
    case kFloat64:
      break;  // no weight has it
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

int estimate(Control c, const double* losses, int64_t count, int kind, int64_t q, int scaling, CUstream_st* stream) {
  estimate_kernel<<<1, 1, 0, stream>>>(c, losses, count, kind, q, scaling);
  return cudaGetLastError();
}

int choose(Control c, const double* losses, CUstream_st* stream) {
  choose_kernel<<<1, 1, 0, stream>>>(c, losses);
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace pyzo::cuda
