#pragma once
// Dropout whose mask is the noise field: what the kernels are given, and what happens to one element. No torch.
#include "body/activation.h"
#include "core/field.h"

namespace pyzo {

// An element is kept where its 16 bits of kDropoutStream, tensor key 0, at its index in the contiguous tensor are below
// `keep`, and then scaled by 65536 / keep, so that the expectation is exact.
struct Dropout {
  uint32_t keep;  // of 65536
  double scale;   // rounded to the lanes' precision, which is the correctly rounded quotient there too
};

// A dropped element is 0 whatever it was.
template <class L>
PYZO_HD typename L::F drop(typename L::F x, typename L::U random, typename L::U keep, typename L::F scale) {
  return L::if_below(random, keep, x * scale, constant<L>(0.0));
}

}  // namespace pyzo
