#pragma once
// Launches over the tensors of a pass: what a kernel gets as its parameters, and how many blocks it is worth. No torch.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "body/pass.h"

namespace pyzo::cuda {

constexpr int kThreads = 256;
constexpr int kMaxDevices = 64;

template <class Tensor>
struct EntryOf {
  Tensor tensor;
  int64_t first_tile;
};

// Kernel parameters may take 32,764 bytes: as many tensors as fit go into one launch.
template <class Tensor>
struct LaunchOf {
  static constexpr int kMaxEntries = (32764 - int(sizeof(PassArgs)) - 16) / int(sizeof(EntryOf<Tensor>));

  PassArgs args;
  int64_t tiles;
  int count;
  EntryOf<Tensor> entries[kMaxEntries];
};

// Over whole tensors, over lists of elements, over looked-up rows.
using Launch = LaunchOf<TensorArgs>;
using IndexedLaunch = LaunchOf<IndexedArgs>;
using RowsLaunch = LaunchOf<RowsArgs>;
static_assert(sizeof(Launch) <= 32764 && sizeof(IndexedLaunch) <= 32764 && sizeof(RowsLaunch) <= 32764);

// Cuts the tensors into launches, with `tile` elements to a tile; run(launch) -> error each.
template <class Tensor, class Run>
int in_launches(const PassArgs& args, const Tensor* tensors, size_t count, int64_t tile, const Run& run) {
  LaunchOf<Tensor> launch;
  launch.args = args;
  for (size_t begin = 0; begin < count; begin += LaunchOf<Tensor>::kMaxEntries) {
    launch.count = int(std::min<size_t>(count - begin, LaunchOf<Tensor>::kMaxEntries));
    launch.tiles = 0;
    for (int i = 0; i < launch.count; ++i) {
      const Tensor& t = tensors[begin + size_t(i)];
      launch.entries[i] = {t, launch.tiles};
      launch.tiles += (t.n + tile - 1) / tile;
    }
    if (const int error = run(launch)) return error;
  }
  return 0;
}

// Blocks that fill the current device with this kernel, remembered per device.
template <class Kernel>
inline int resident_blocks(Kernel kernel, std::atomic<int>* known, int64_t tiles, unsigned& blocks) {
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

}  // namespace pyzo::cuda
