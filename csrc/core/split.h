#pragma once
// A float32 master weight in two parts: the bfloat16 weight that the model computes with, and 16 low bits beside it,
//   bits(master) = (bits(weight) << 16) + low,  low in [-2^15, 2^15),
// so that the weight is the master rounded to nearest, a tie away from zero. Every number has its two parts; but
//   - a finite master makes no infinite weight: it is held at 0x7f7f7fff, the largest that rounds to a finite one;
//   - a weight that is infinite or NaN is its own master, whatever lies beside it;
//   - a zero with negative low bits, which no master has (a weight was set to zero from outside), is read as that zero.
#include "core/rounding.h"

namespace pyzo {

template <class L>
struct Parts {
  typename L::F weight;  // a bfloat16 value
  typename L::U low;     // its 16 bits, zero-extended
};

template <class L>
PYZO_HD typename L::F join(typename L::F weight, typename L::U low) {
  using U = typename L::U;
  const U u = magnitude<L>(weight), sign = L::as_u(weight) & L::splat(0x80000000u);
  const U raised = u + (low ^ L::splat(0x8000u));  // by 2^15, so that nothing is negative
  const U m = L::below(raised, L::splat(0x8000u), L::splat(0u), raised - L::splat(0x8000u));
  return L::as_f(L::below(u, L::splat(0x7f800000u), sign | m, L::as_u(weight)));
}

// master: no NaN.
template <class L>
PYZO_HD Parts<L> split(typename L::F master) {
  using U = typename L::U;
  const U u = magnitude<L>(master), sign = L::as_u(master) & L::splat(0x80000000u);
  const U held = L::below(u, L::splat(0x7f7f8000u), u, L::splat(0x7f7f7fffu));
  const U m = L::below(u, L::splat(0x7f800000u), held, u);
  const U upper = (m + L::splat(0x8000u)) & L::splat(0xffff0000u);
  return {L::as_f(sign | upper), (m - upper) & L::splat(0xffffu)};
}

// The parts of a new master, or those that there were where it is no other or NaN.
template <class L>
PYZO_HD Parts<L> split_changed(typename L::F v, typename L::F master, const Parts<L>& old) {
  const Parts<L> parts = split<L>(v);
  const auto if_changed = [&](typename L::F yes, typename L::F no) {
    return L::if_less(v, master, yes, L::if_less(master, v, yes, no));
  };
  return {if_changed(parts.weight, old.weight), L::as_u(if_changed(L::as_f(parts.low), L::as_f(old.low)))};
}

}  // namespace pyzo
