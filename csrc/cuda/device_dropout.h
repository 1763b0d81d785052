#pragma once
// Dropout on CUDA: torch's current stream and error checks.
#include "cuda/layers.h"
#include "cuda/stream.h"

namespace pyzo {

struct CudaDropout {
  static void dropout(const Tensor& at, const Elements& e, const Dropout& d, const int64_t* seed) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::dropout(e, d, seed, stream); });
  }
};

}  // namespace pyzo
