#pragma once
// Activations on the CPU: torch's threads over tiles.
#include <torch/csrc/stable/ops.h>

#include "cpu/layers.h"
#include "ops/layers.h"

namespace pyzo {

constexpr int64_t kLayerGrain = 16;  // tiles a thread must have to be worth waking

// Calls run(first element, end) on torch's threads for stretches of whole tiles of [0, n).
template <class Run>
void parallel_tiles(int64_t n, const Run& run) {
  const int64_t tiles = (n + cpu::kLayerTile - 1) / cpu::kLayerTile;
  torch::stable::parallel_for(0, tiles, kLayerGrain, [&](int64_t begin, int64_t end) {
    run(begin * cpu::kLayerTile, std::min(end * cpu::kLayerTile, n));
  });
}

struct CpuActivation {
  static void activation(const Tensor&, const Elements& e, int function) {
    const auto kernel = cpu::layers(e.dtype).activation;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, function, begin, end); });
  }

  static void activation_backward(const Tensor&, const Elements& e, int function) {
    const auto kernel = cpu::layers(e.dtype).activation_backward;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, function, begin, end); });
  }

  static void coded_activation(const Tensor&, const Elements& e, int function, const Levels& thresholds,
                               uint8_t* codes) {
    const auto kernel = cpu::layers(e.dtype).coded_activation;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, function, thresholds, codes, begin, end); });
  }

  static void coded_activation_backward(const Tensor&, const Elements& e, const Levels& slopes, const uint8_t* codes) {
    const auto kernel = cpu::layers(e.dtype).coded_activation_backward;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, slopes, codes, begin, end); });
  }

  static void output_activation_backward(const Tensor&, const Elements& e, int function, const uint8_t* sides) {
    const auto kernel = cpu::layers(e.dtype).output_activation_backward;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, function, sides, begin, end); });
  }
};

}  // namespace pyzo
