#pragma once
// Activations on CUDA: torch's current stream and error checks.
#include "cuda/layers.h"
#include "cuda/stream.h"

namespace pyzo {

struct CudaActivation {
  static void activation(const Tensor& at, const Elements& e, int function) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::activation(e, function, stream); });
  }

  static void activation_backward(const Tensor& at, const Elements& e, int function) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::activation_backward(e, function, stream); });
  }

  static void coded_activation(const Tensor& at, const Elements& e, int function, const Levels& thresholds,
                               uint8_t* codes) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::coded_activation(e, function, thresholds, codes, stream); });
  }

  static void coded_activation_backward(const Tensor& at, const Elements& e, const Levels& slopes,
                                        const uint8_t* codes) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::coded_activation_backward(e, slopes, codes, stream); });
  }

  static void output_activation_backward(const Tensor& at, const Elements& e, int function, const uint8_t* sides) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::output_activation_backward(e, function, sides, stream); });
  }
};

}  // namespace pyzo
