#pragma once
// Norms on CUDA: torch's current stream and error checks.
#include "cuda/layers.h"
#include "cuda/stream.h"
#include "ops/norm.h"

namespace pyzo {

struct CudaNorm {
  // float32 numbers: the sums of each block of rows.
  static int64_t norm_scratch(const NormArgs& a, bool sums) {
    return sums ? 2 * a.columns * cuda::norm_blocks(a.rows) : 0;
  }

  static void norm(const Tensor& at, const NormArgs& a, const NormForward& f, void*) {
    on_stream(at, [&](CUstream_st* stream) { return cuda::norm(a, f, stream); });
  }

  static void norm_backward(const Tensor& at, const NormArgs& a, const NormBackward& b, void* scratch) {
    float* sums = b.dweight || b.dbias ? static_cast<float*>(scratch) : nullptr;
    on_stream(at, [&](CUstream_st* stream) { return cuda::norm_backward(a, b, sums, stream); });
  }
};

}  // namespace pyzo
