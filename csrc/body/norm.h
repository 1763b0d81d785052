#pragma once
// What the kernels of norms are given. No torch.
#include "core/norm.h"
#include "core/rounding.h"

namespace pyzo {

// Rows are contiguous. gamma = offset + weight; absent parameters are null, then gamma is 1 and beta 0.
struct NormArgs {
  Dtype input, output;  // dtypes of x and of y
  int64_t rows, columns;
  bool centered;  // LayerNorm; else RMSNorm
  double eps, offset;
  const void *weight, *bias;
  Dtype weight_dtype, bias_dtype;
};

// The row statistic and the sums over rows are float32 (float64 where x is).
struct NormForward {
  const void* x;
  void *y, *rstd;
};

struct NormBackward {
  const void* gradient;
  const void* saved;  // y, or x where from_input
  const void* rstd;
  void* dx;
  void *dweight, *dbias;  // null where not wanted
  bool from_input;
};

}  // namespace pyzo
