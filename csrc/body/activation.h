#pragma once
// What the kernels of activations are given, and the choice of the function. No torch.
#include "core/codec.h"
#include "core/functions.h"
#include "core/output.h"
#include "core/rounding.h"

namespace pyzo {

// n elements of one dtype, read from `in` and written to `out`, contiguous. The exact backward pass writes values too
// where they have memory, which may be that of the gradient.
struct Elements {
  Dtype dtype;
  int64_t n;
  const void* in[2];
  void *out, *value = nullptr;
};

template <int kFunction>
struct FunctionTag {
  static constexpr int value = kFunction;
};

// Calls run(FunctionTag<f>{}) for a function that is known only now.
template <class Run>
PYZO_HD void with_function(int f, const Run& run) {
  switch (f) {
    case kRelu:
      return run(FunctionTag<kRelu>{});
    case kGelu:
      return run(FunctionTag<kGelu>{});
    case kGeluTanh:
      return run(FunctionTag<kGeluTanh>{});
    case kQuickGelu:
      return run(FunctionTag<kQuickGelu>{});
    case kSilu:
      return run(FunctionTag<kSilu>{});
    case kMish:
      return run(FunctionTag<kMish>{});
    case kSoftplus:
      return run(FunctionTag<kSoftplus>{});
    case kElu:
      return run(FunctionTag<kElu>{});
    case kHardswish:
      return run(FunctionTag<kHardswish>{});
  }
}

}  // namespace pyzo
