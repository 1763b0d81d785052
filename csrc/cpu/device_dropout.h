#pragma once
// Dropout on the CPU: torch's threads over tiles.
#include "cpu/device_activation.h"

namespace pyzo {

struct CpuDropout {
  static void dropout(const Tensor&, const Elements& e, const Dropout& d, const int64_t* seed) {
    const auto kernel = cpu::layers(e.dtype).dropout;
    parallel_tiles(e.n, [&](int64_t begin, int64_t end) { kernel(e, d, uint64_t(*seed), begin, end); });
  }
};

}  // namespace pyzo
