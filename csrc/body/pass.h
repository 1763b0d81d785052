#pragma once
// What a pass does to one element (or one vector of elements): undo, update, perturb, in this order, each rounded to
// storage.
//   undo     w <- round(w + undo_scale z_u)                   takes back an in-place perturbation
//   update   w, state <- round(rule(w, g, state)), g = sum_j c_j z_j
//   perturb  w <- round(w + perturb_scale z_p)
// An element outside the mask keeps weight and state, and a result that is NaN or no other keeps what was there. A
// bfloat16 weight with low bits beside it (core/split.h) stands for a float32 master, which an update reads and makes
// unrounded; such a pass does nothing else. The drivers in cpu/ and cuda/ supply the noise and move the data.
#include "core/control.h"
#include "core/masks.h"
#include "core/rounding.h"
#include "core/split.h"

namespace pyzo {

constexpr int kMaxStates = 2;

// One pass over a list of tensors; the same for every tensor. Negative directions mean "none".
struct PassArgs {
  Control control;
  int distribution;
  int undo;            // direction to take back
  float undo_sign;     // times the row's eps
  int rule;            // of the update
  int directions;      // update with directions 0..directions-1; 0: no update
  float update_sign;   // times the row's lr
  bool chosen;         // times the choice of a conservative step, too
  bool retract;        // rounds so that the same update with the other sign is taken back
  int perturb;         // direction to add at the end
  float perturb_sign;  // times the row's eps
  bool stochastic;     // round updates of 16-bit weights and states stochastically
  bool masked;         // heed the masks of the rows
  bool trial;          // read low bits, but do not write them
};

struct TensorArgs {
  const void* src;
  void* dst;
  void* state[kMaxStates];
  int64_t n;
  uint64_t key;
  Shard shard;
  int64_t row;          // of the control tensor
  const uint8_t* bits;  // packed mask, or null
  uint16_t* low;        // low bits of the masters of bfloat16 weights, or null
  PYZO_HD bool in_place() const { return !src || src == dst; }
};

// The listed elements of a tensor, all that an indexed pass touches. n, src and the states are the list's: element i of
// them belongs to element indices[i] of dst, and so do the low bits. src is null where the weights are read from dst.
struct IndexedArgs : TensorArgs {
  const int64_t* indices;
  int64_t size;  // of dst
};

// Rows of a matrix [size, width] that were looked up, all that a pass over rows touches: row i of dst is a copy of row
// ids[i] of the matrix, to which shard and packed mask belong. n is the elements of dst; src is dst, no state is kept.
struct RowsArgs : TensorArgs {
  const int64_t* ids;
  int64_t size, width;
};

// A row's scalars as the update of this pass takes them.
PYZO_HD Group group_of(const PassArgs& a, int64_t row) {
  Group group = a.control.group(row);
  group.lr *= double(a.update_sign);
  if (a.chosen) group.lr *= a.control.choice();
  return group;
}

// The scalars of one tensor in one pass, ready for lanes.
template <class L, int kRule>
struct PassLanes {
  typename RuleOf<L, kRule>::type rule;
  typename L::F undo_scale, perturb_scale;
  PYZO_HD PassLanes(const PassArgs& a, int64_t row)
      : rule(group_of(a, row)),
        undo_scale(L::splat(a.undo_sign * float(a.control.row(row)[Control::kEps]))),
        perturb_scale(L::splat(a.perturb_sign * float(a.control.row(row)[Control::kEps]))) {}
};

// Which elements of a tensor a pass may move: those whose 16 mask bits are below `keep`, whose magnitude, as it was
// read, is at most `most`, and whose bit of `packed` is set. Where weights move in place no magnitude counts: a
// perturbation may have carried it over the threshold, and the caller has noted in bits what it was before.
struct Mask {
  uint32_t keep;
  int32_t most;
  const uint8_t* packed;  // or null
  PYZO_HD bool keeps_all() const { return keep >= kKeepAll && most == kAnyMagnitude && !packed; }
};

PYZO_HD Mask mask_of(const PassArgs& a, const TensorArgs& t, bool in_place) {
  if (!a.masked) return {kKeepAll, kAnyMagnitude, nullptr};
  const float threshold = a.control.threshold(t.row);
  const bool any = in_place || threshold == bits<float>(0x7f800000u);  // then a NaN may move, too
  return {a.control.keep(t.row), any ? kAnyMagnitude : largest_kept(threshold), t.bits};
}
PYZO_HD Mask mask_of(const PassArgs& a, const TensorArgs& t) { return mask_of(a, t, t.in_place()); }
PYZO_HD Mask mask_of(const PassArgs& a, const RowsArgs& t) { return mask_of(a, t, false); }  // the matrix does not move

// A skipped step (ok = 0) still undoes and perturbs, but does not update.
PYZO_HD bool updates(const PassArgs& a) { return a.directions > 0 && a.control.ok(); }

// Whether the pass updates masters.
PYZO_HD bool splits(const PassArgs& a, const TensorArgs& t) { return t.low && updates(a); }

// w + scale z, rounded: perturb, and undo with the opposite scale.
template <class L, Dtype T>
PYZO_HD typename L::F add_noise(typename L::F w, typename L::F z, typename L::F scale) {
  return to_storage<L, T>(L::fma(scale, z, w));
}

// A new weight or state, rounded to its storage.
template <class L, Dtype T, bool kStochastic>
PYZO_HD typename L::F round_update(typename L::F v, typename L::U random) {
  if constexpr (kStochastic && T != kFloat32)
    return round_stochastic<L, T, !L::kPlainNaN>(v, random);
  else
    return to_storage<L, T>(v);
}

// What rounds a new weight or state with random bits, 16 of them, for storage that is known when compiled.
template <class L, Dtype T, bool kStochastic>
struct RoundUpdate {
  PYZO_HD typename L::F operator()(typename L::F v, typename L::U random) const {
    return round_update<L, T, kStochastic>(v, random);
  }
};

// random: 16 bits.
template <class L, int kRule, class RoundWeight, class RoundState>
PYZO_HD typename L::F update_element(typename L::F w, typename L::F g, typename L::F* state, typename L::U random,
                                     const PassLanes<L, kRule>& s, const RoundWeight& round_weight,
                                     const RoundState& round_state) {
  typename L::F old[kMaxStates];
  PYZO_UNROLL
  for (int i = 0; i < RuleOf<L, kRule>::type::kStates; ++i) old[i] = state[i];
  const typename L::F v = round_weight(s.rule(w, g, state), random);
  PYZO_UNROLL
  for (int i = 0; i < RuleOf<L, kRule>::type::kStates; ++i)
    state[i] = L::if_changed(round_state(state[i], state_bits<L>(random, i)), old[i]);
  return v;
}

// T: of the weight, S: of the state.
template <class L, Dtype T, Dtype S, bool kStochastic, int kRule>
PYZO_HD typename L::F update_element(typename L::F w, typename L::F g, typename L::F* state, typename L::U random,
                                     const PassLanes<L, kRule>& s) {
  return update_element<L>(w, g, state, random, s, RoundUpdate<L, T, kStochastic>{}, RoundUpdate<L, S, kStochastic>{});
}

}  // namespace pyzo
