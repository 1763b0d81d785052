#pragma once
// Update rules as pure functions (parameter, estimate, scalars) -> parameter, in fp32, before rounding to storage.
#include "core/lane.h"

namespace pyzo {

// What a rule needs from its parameter group.
struct Group {
  float lr, eps, weight_decay;
};

// The same, ready for lanes.
template <class L>
struct GroupLanes {
  typename L::F minus_lr, weight_decay;
  bool decays;
  explicit PYZO_HD GroupLanes(const Group& g)
      : minus_lr(L::splat(-g.lr)), weight_decay(L::splat(g.weight_decay)), decays(g.weight_decay != 0.0f) {}
};

// w <- w - lr (g + wd w). The decay term is left out, not multiplied by zero, where wd is 0.
template <class L>
PYZO_HD typename L::F sgd(typename L::F w, typename L::F g, const GroupLanes<L>& group) {
  if (group.decays) g = L::fma(group.weight_decay, w, g);
  return L::fma(group.minus_lr, g, w);
}

}  // namespace pyzo
