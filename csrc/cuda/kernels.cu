// The CUDA driver: cuts a pass into launches; the kernels that fill noise and those that keep the control tensor. No
// torch.
#include "cuda/pass.cuh"

namespace pyzo::cuda {
namespace {

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

__global__ void estimate_kernel(Control c, const double* losses, int64_t count, int kind, int64_t q, int scaling) {
  pyzo::estimate(c, losses, count, kind, q, scaling);
}

__global__ void choose_kernel(Control c, const double* losses) { pyzo::choose(c, losses); }

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

int pass(const PassArgs& args, const TensorArgs* tensors, size_t count, Dtype dtype, Dtype state, CUstream_st* stream) {
  static_assert(Layout<kFloat32>::kTile == Layout<kFloat16>::kTile);
  const auto launch_of = args.directions == 0     ? pass_sgd
                         : args.rule == kSign     ? pass_sign
                         : args.rule == kMomentum ? pass_momentum
                         : args.rule == kAdam     ? pass_adam
                                                  : pass_sgd;
  Launch launch;
  launch.args = args;
  for (size_t begin = 0; begin < count; begin += kMaxEntries) {
    launch.count = int(std::min<size_t>(count - begin, kMaxEntries));
    launch.tiles = 0;
    for (int i = 0; i < launch.count; ++i) {
      launch.entries[i] = {tensors[begin + size_t(i)], launch.tiles};
      launch.tiles += (tensors[begin + size_t(i)].n + Layout<kFloat32>::kTile - 1) / Layout<kFloat32>::kTile;
    }
    if (const int error = launch_of(launch, dtype, state, stream)) return error;
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
