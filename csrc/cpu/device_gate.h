#pragma once
// Gates on the CPU: torch's threads over tiles.
#include "cpu/device_activation.h"

namespace pyzo {

struct CpuGate {
  static void gate(const Tensor&, const GateArgs& a, int function) { run(cpu::layers(a.dtype).gate, a, function); }

  static void gate_backward(const Tensor&, const GateArgs& a, int function) {
    run(cpu::layers(a.dtype).gate_backward, a, function);
  }

 private:
  template <class Kernel>
  static void run(Kernel kernel, const GateArgs& a, int function) {
    torch::stable::parallel_for(0, a.rows * cpu::gate_tiles(a.columns), kLayerGrain,
                                [&](int64_t begin, int64_t end) { kernel(a, function, begin, end); });
  }
};

}  // namespace pyzo
