#pragma once
// What a pass does to one element (or one vector of elements): undo, update, perturb, in this order, each rounded to
// storage.
//   undo     w <- round(w + undo_scale z_u)         takes back an in-place perturbation
//   update   w <- round(rule(w, g)), g = sum_j c_j z_j
//   perturb  w <- round(w + perturb_scale z_p)
// The drivers in cpu/ and cuda/ supply the noise and move the data.
#include "core/control.h"
#include "core/rounding.h"

namespace pyzo {

// One pass over a list of tensors; the same for every tensor. Negative directions mean "none".
struct PassArgs {
  Control control;
  int distribution;
  int undo;            // direction to take back
  float undo_sign;     // times the row's eps
  int directions;      // update with directions 0..directions-1; 0: no update
  int perturb;         // direction to add at the end
  float perturb_sign;  // times the row's eps
  bool stochastic;     // round updates of 16-bit weights stochastically
};

struct TensorArgs {
  const void* src;
  void* dst;
  int64_t n;
  uint64_t key;
  Shard shard;
  int64_t row;  // of the control tensor
};

// The scalars of one tensor in one pass.
struct PassScalars {
  Group group;
  float undo_scale, perturb_scale;
  PYZO_HD PassScalars(const PassArgs& a, int64_t row)
      : group(a.control.group(row)), undo_scale(a.undo_sign * group.eps), perturb_scale(a.perturb_sign * group.eps) {}
};

template <class L>
struct PassLanes {
  GroupLanes<L> group;
  typename L::F undo_scale, perturb_scale;
  explicit PYZO_HD PassLanes(const PassScalars& s)
      : group(s.group), undo_scale(L::splat(s.undo_scale)), perturb_scale(L::splat(s.perturb_scale)) {}
};

// A skipped step (ok = 0) still undoes and perturbs, but does not update.
PYZO_HD bool updates(const PassArgs& a) { return a.directions > 0 && a.control.ok(); }

// w + scale z, rounded: perturb, and undo with the opposite scale.
template <class L, Dtype T>
PYZO_HD typename L::F add_noise(typename L::F w, typename L::F z, typename L::F scale) {
  return to_storage<L, T>(L::fma(scale, z, w));
}

template <class L, Dtype T, bool kStochastic>
PYZO_HD typename L::F update_element(typename L::F w, typename L::F g, typename L::U random, const PassLanes<L>& s) {
  const typename L::F v = sgd<L>(w, g, s.group);
  if constexpr (kStochastic)
    return round_stochastic<L, T, !L::kPlainNaN>(v, random);
  else
    return to_storage<L, T>(v);
}

template <class L, Dtype T, bool kUndo, bool kUpdate, bool kPerturb, bool kStochastic>
PYZO_HD typename L::F pass_element(typename L::F w, typename L::F undo, typename L::F g, typename L::F perturb,
                                   typename L::U random, const PassLanes<L>& s) {
  typename L::F v = w;
  if constexpr (kUndo) v = add_noise<L, T>(v, undo, s.undo_scale);
  if constexpr (kUpdate) v = update_element<L, T, kStochastic>(v, g, random, s);
  if constexpr (kPerturb) v = add_noise<L, T>(v, perturb, s.perturb_scale);
  return L::if_changed(v, w);
}

}  // namespace pyzo
