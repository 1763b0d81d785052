#pragma once
// Arithmetic of norms, element by element: forward, the normalised value from either side, and the gradient of the
// input. Every operation is rounded once and none is fused, so that all lanes agree.
#include "core/lane.h"

namespace pyzo {

// RMSNorm has mean 0. Without parameters gamma is 1 and beta 0.
template <class L>
PYZO_HD typename L::F normalized(typename L::F x, typename L::F mean, typename L::F rstd) {
  return (x - mean) * rstd;
}

// The normalised value again, from the output. inverse: 1 / gamma.
template <class L>
PYZO_HD typename L::F recovered(typename L::F y, typename L::F beta, typename L::F inverse) {
  return (y - beta) * inverse;
}

// g: gamma times the gradient of the output; mean_g (0 for RMSNorm) and mean_gx: means over the row of g and of g times
// the normalised value.
template <class L>
PYZO_HD typename L::F input_gradient(typename L::F g, typename L::F normalized, typename L::F mean_g,
                                     typename L::F mean_gx, typename L::F rstd) {
  return ((g - mean_g) - normalized * mean_gx) * rstd;
}

}  // namespace pyzo
