#pragma once
// Gates on CUDA: torch's current stream and error checks.
#include "cuda/layers.h"
#include "cuda/stream.h"

namespace pyzo {

struct CudaGate {
  static void gate(const Tensor& at, const GateArgs& a, int function) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::gate(a, function, stream); });
  }

  static void gate_backward(const Tensor& at, const GateArgs& a, int function) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::gate_backward(a, function, stream); });
  }
};

}  // namespace pyzo
