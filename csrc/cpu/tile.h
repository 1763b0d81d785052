// The pass of one instruction set: cuts tensors into runs and tiles, has noise filled tile by tile, applies the pass.
// Included once by each cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
#include <type_traits>

#include "cpu/masks.h"

namespace pyzo::cpu::PYZO_ISA {

// What one tensor's share of a pass is, the same for all its tiles.
template <int kRule>
struct TensorPass {
  const PassArgs& a;
  const TensorArgs& t;
  PassLanes<Lanes, kRule> lanes;
  bool update, stochastic;
  Mask mask;
  bool masked, split;
};

// Whether something is rounded to 16 bits.
template <Dtype T, Dtype S, int kRule>
constexpr bool kRounds = T != kFloat32 || (RuleOf<Lanes, kRule>::type::kStates > 0 && S != kFloat32);

template <Dtype T, Dtype S, int kRule>
TensorPass<kRule> pass_over(const PassArgs& a, const TensorArgs& t, const Mask& mask) {
  const bool update = updates(a), split = splits(a, t);
  const bool rounds = split ? kRounds<kFloat32, S, kRule> : kRounds<T, S, kRule>;
  return {a, t, {a, t.row}, update, update && a.stochastic && rounds, mask, !mask.keeps_all(), split};
}

// The noise of a tile as a pass needs it.
struct TileNoise {
  Tile undo, estimate, perturb;
  RandomBits rounding;
  RandomBits mask;    // of what the mask keeps they are below min(keep, kNeverKept); magnitudes are not in it
  const Tile *u, *p;  // where undo's and perturb's noise is
  float scale;        // of the estimate

  // Of elements [first, last) of the tile; a Place says where they lie in the field, as Neighbours does.
  template <int kRule, class Place>
  void draw(const TensorPass<kRule>& pass, const Place& place, int64_t first, int64_t last);
};

template <int kRule, class Place>
void TileNoise::draw(const TensorPass<kRule>& pass, const Place& place, int64_t first, int64_t last) {
  const PassArgs& a = pass.a;
  const auto fill_direction = [&](int j, Tile& z) {
    place.noise(a.distribution, {a.control.seed(j), pass.t.key}, first, last, z);
  };
  const bool is_undone = a.undo >= 0, is_perturbed = a.perturb >= 0;
  scale = 1.0f;
  u = &undo, p = &perturb;
  if (pass.update && a.directions == 1) {  // one direction serves everything that names it
    fill_direction(0, estimate);
    scale = a.control.coefficient(pass.t.row, 0);
    if (a.undo == 0) u = &estimate;
    if (a.perturb == 0) p = &estimate;
  } else if (pass.update) {
    for (int j = 0; j < a.directions; ++j) {
      Tile& z = j == a.undo ? undo : perturb;
      fill_direction(j, z);
      const F c = Lanes::splat(a.control.coefficient(pass.t.row, j));
      for (int64_t k = first / kLanes; k * kLanes < last; ++k)
        estimate.v[k] = j == 0 ? c * z.v[k] : Lanes::fma(c, z.v[k], estimate.v[k]);
    }
  }
  if (is_undone && u == &undo && !(pass.update && a.undo < a.directions)) fill_direction(a.undo, undo);
  if (is_perturbed && p == &perturb) {
    if (is_undone && a.perturb == a.undo)
      p = u;
    else
      fill_direction(a.perturb, perturb);
  }
  if (pass.stochastic)
    place.random({a.control.rounding_seed(), pass.t.key}, kRoundingStream, a.retract ? 0xffffffffu : 0u, first, last,
                 rounding);
  if (pass.mask.keep < kKeepAll)
    place.random({a.control.mask_seed(pass.t.row), pass.t.key}, kMaskStream, 0u, first, last, mask);
  else if (pass.masked)
    mask = {};
}

// Bits of `kDoes`: what a pass does is known when compiled (kKnown), or read from its arguments. kSplits: it updates
// masters, with or without a mask.
enum Does : int { kPerturbs = 1, kUpdates = 2, kUndoes = 4, kKnown = 8, kSplits = 16 };

// Elements [first, last) of a tile. Pointers stand at the tile's element 0, which may lie before the tensor's first.
template <Dtype T, Dtype S, bool kStochastic, int kDoes, int kRule>
void apply(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst, char* const* state,
           uint16_t* low, int64_t first, int64_t last) {
  constexpr int kStates = RuleOf<Lanes, kRule>::type::kStates;
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kStateSize = S == kFloat32 ? 4 : 2;
  constexpr bool kSplit = (kDoes & kSplits) != 0;
  const PassLanes<Lanes, kRule> s = pass.lanes;
  const F c = Lanes::splat(noise.scale);
  const Tile *const zu = noise.u, *const zp = noise.p;
  const bool undo = kDoes & kKnown ? (kDoes & kUndoes) != 0 : pass.a.undo >= 0;
  const bool update = kDoes & kKnown ? (kDoes & kUpdates) != 0 : pass.update;
  const bool perturb = kDoes & kKnown ? (kDoes & kPerturbs) != 0 : pass.a.perturb >= 0;
  const bool masked = kDoes & kKnown && !kSplit ? false : pass.masked;
  const U keep = Lanes::splat(pass.mask.keep < kNeverKept ? pass.mask.keep : kNeverKept);

  struct Vector {
    F w, state[kMaxStates];
    U low;
  };
  // The vector at i of the tile, whose data is `at` of the pointers.
  const auto result = [&](int64_t i, int64_t at, const void* from, const char* const* from_state,
                          const uint16_t* from_low) {
    const F w = Lanes::load<T>(from, at);
    Parts<Lanes> parts{w, {}};
    if constexpr (kSplit) parts.low = Lanes::load_u16(from_low + at);
    const F before = kSplit ? join<Lanes>(w, parts.low) : w;
    const auto if_kept = [&](F yes, F no) {
      const F drawn = Lanes::if_below(Lanes::load_u16(noise.mask.bits + i), keep, yes, no);
      return if_small<Lanes>(w, pass.mask.most, drawn, no);
    };
    Vector x = {before, {}, {}};
    if (undo) x.w = add_noise<Lanes, T>(x.w, zu->at(i), s.undo_scale);
    if (update) {
      U random{};
      if constexpr (kStochastic) random = Lanes::load_u16(noise.rounding.bits + i);
      F old[kMaxStates];
      for (int k = 0; k < kStates; ++k) x.state[k] = old[k] = Lanes::load<S>(from_state[k], at);
      x.w = update_element<Lanes, kSplit ? kFloat32 : T, S, kStochastic>(x.w, c * noise.estimate.at(i), x.state, random,
                                                                         s);
      if (masked)
        for (int k = 0; k < kStates; ++k) x.state[k] = if_kept(x.state[k], old[k]);
    }
    if (perturb) x.w = add_noise<Lanes, T>(x.w, zp->at(i), s.perturb_scale);
    if (masked) x.w = if_kept(x.w, before);
    if constexpr (kSplit) {
      const Parts<Lanes> changed = split_changed<Lanes>(x.w, before, parts);
      x.w = changed.weight, x.low = changed.low;
    } else {
      x.w = Lanes::if_changed(x.w, w);
    }
    return x;
  };
  const bool keeps_low = kSplit && !pass.a.trial;
  const auto store_beside = [&](char* const* to, uint16_t* to_low, int64_t at, const Vector& x) {
    if (update)
      for (int k = 0; k < kStates; ++k) Lanes::store<S>(to[k], at, x.state[k]);
    if (keeps_low) Lanes::store_u16(to_low + at, x.low);
  };
  const auto whole = [&](int64_t i) {
    const Vector x = result(i, i, src, state, low);
    Lanes::store<T>(dst, i, x.w);
    store_beside(state, low, i, x);
  };
  const auto some = [&](int64_t i, int64_t from, int64_t to) {  // part of the vector at i
    alignas(64) char buffer[4 * kLanes] = {}, state_buffer[kMaxStates][4 * kLanes] = {};
    uint16_t low_buffer[kLanes] = {};
    char* at_state[kMaxStates] = {state_buffer[0], state_buffer[1]};
    __builtin_memcpy(buffer + (from - i) * kSize, src + from * kSize, (to - from) * kSize);
    for (int k = 0; k < kStates; ++k)
      __builtin_memcpy(at_state[k] + (from - i) * kStateSize, state[k] + from * kStateSize, (to - from) * kStateSize);
    if constexpr (kSplit) __builtin_memcpy(low_buffer + (from - i), low + from, (to - from) * sizeof *low);
    const Vector x = result(i, 0, buffer, at_state, low_buffer);
    Lanes::store<T>(buffer, 0, x.w);
    store_beside(at_state, low_buffer, 0, x);
    __builtin_memcpy(dst + from * kSize, buffer + (from - i) * kSize, (to - from) * kSize);
    for (int k = 0; k < kStates; ++k)
      __builtin_memcpy(state[k] + from * kStateSize, at_state[k] + (from - i) * kStateSize, (to - from) * kStateSize);
    if (keeps_low) __builtin_memcpy(low + from, low_buffer + (from - i), (to - from) * sizeof *low);
  };
  int64_t i = first / kLanes * kLanes;
  if (i < first) {
    some(i, first, last < i + kLanes ? last : i + kLanes);
    i += kLanes;
  }
#pragma GCC unroll 2
  for (; i + 2 * kLanes <= last; i += 2 * kLanes) {
    // A line two tiles ahead is fetched meanwhile: between tiles the noise keeps the memory waiting.
    __builtin_prefetch(src + (i + 2 * kTile) * kSize, 1);
    for (int k = 0; k < kStates; ++k) __builtin_prefetch(state[k] + (i + 2 * kTile) * kStateSize, 1);
    if constexpr (kSplit) __builtin_prefetch(low + i + 2 * kTile, 1);
    const Vector x = result(i, i, src, state, low), y = result(i + kLanes, i + kLanes, src, state, low);
    Lanes::store2<T>(dst, i, x.w, y.w);
    store_beside(state, low, i, x);
    store_beside(state, low, i + kLanes, y);
  }
  if (i + kLanes <= last) {
    whole(i);
    i += kLanes;
  }
  if (i < last) some(i, i, last);
}

// Decides as it runs what to do; but a pass over masters, which does nothing but update, has code of its own.
template <Dtype T, Dtype S, bool kStochastic, int kRule>
void apply_any(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst, char* const* state,
               uint16_t* low, int64_t first, int64_t last) {
  if constexpr (T == kBFloat16) {
    constexpr bool kRoundsState = kStochastic && kRounds<kFloat32, S, kRule>;
    constexpr int kDoes = kKnown | kUpdates | kSplits;
    if (pass.split) return apply<T, S, kRoundsState, kDoes>(pass, noise, src, dst, state, low, first, last);
  }
  apply<T, S, kStochastic, 0>(pass, noise, src, dst, state, low, first, last);
}

// What most steps consist of has code of its own where lanes are fast: anything that SGD may do, and the update of any
// rule with or without undo, without a mask. Every other pass decides as it runs.
template <Dtype T, Dtype S, bool kStochastic, int kRule>
void apply_known(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst, char* const* state,
                 uint16_t* low, int64_t first, int64_t last) {
  if constexpr (kLanes > 4) {
    const int does =
        (pass.a.undo >= 0 ? kUndoes : 0) | (pass.update ? kUpdates : 0) | (pass.a.perturb >= 0 ? kPerturbs : 0);
    switch (pass.masked || pass.split ? -1 : does) {
#define PYZO_CASE(does)                                                              \
  case does:                                                                         \
    if constexpr (kRule == kSgd || does == kUpdates || does == (kUndoes | kUpdates)) \
      return apply < T, S, kStochastic && ((does) & kUpdates) != 0,                  \
             kKnown | does > (pass, noise, src, dst, state, low, first, last);       \
    break;
      PYZO_CASE(0)
      PYZO_CASE(1)
      PYZO_CASE(2)
      PYZO_CASE(3)
      PYZO_CASE(4)
      PYZO_CASE(5)
      PYZO_CASE(6)
      PYZO_CASE(7)
#undef PYZO_CASE
    }
  }
  apply_any<T, S, kStochastic>(pass, noise, src, dst, state, low, first, last);
}

// The same for any rounding.
template <Dtype T, Dtype S, int kRule>
void apply_rounded(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst,
                   char* const* state, uint16_t* low, int64_t first, int64_t last) {
  if constexpr (kRounds<T, S, kRule>) {
    if (pass.stochastic) return apply_known<T, S, true>(pass, noise, src, dst, state, low, first, last);
  }
  apply_known<T, S, false>(pass, noise, src, dst, state, low, first, last);
}

template <Dtype T, Dtype S, int kRule>
void pass_tensor(const PassArgs& a, const TensorArgs& t, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kStateSize = S == kFloat32 ? 4 : 2;
  constexpr int kStates = RuleOf<Lanes, kRule>::type::kStates;
  const TensorPass<kRule> pass = pass_over<T, S, kRule>(a, t, mask_of(a, t));
  TileNoise noise;
  for_runs(t.shard, begin, end, [&](int64_t local, uint64_t global, int64_t n) {
    for_tiles(global, n, [&](uint64_t start, int64_t first, int64_t last, int64_t done) {
      const int64_t origin = local + done - first;
      noise.draw(pass, Neighbours{start}, first, last);
      if (pass.mask.packed) leave_out(pass.mask.packed, origin, first, last, noise.mask);
      const char* src = static_cast<const char*>(t.src) + origin * kSize;
      char* dst = static_cast<char*>(t.dst) + origin * kSize;
      char* state[kMaxStates] = {};
      for (int k = 0; k < kStates; ++k) state[k] = static_cast<char*>(t.state[k]) + origin * kStateSize;
      uint16_t* const low = pass.split ? t.low + origin : nullptr;
      apply_rounded<T, S>(pass, noise, src, dst, state, low, first, last);
    });
  });
}

template <int kRule>
using RuleTag = std::integral_constant<int, kRule>;

template <Dtype T, class Run>
void with_rule(const PassArgs& a, Dtype state, const Run& run) {
  const bool narrow = state == kBFloat16;
  switch (updates(a) ? a.rule : int(kSgd)) {
    case kSgd:
      return run(DtypeTag<T>{}, DtypeTag<kFloat32>{}, RuleTag<kSgd>{});
    case kSign:
      return run(DtypeTag<T>{}, DtypeTag<kFloat32>{}, RuleTag<kSign>{});
    case kMomentum:
      return narrow ? run(DtypeTag<T>{}, DtypeTag<kBFloat16>{}, RuleTag<kMomentum>{})
                    : run(DtypeTag<T>{}, DtypeTag<kFloat32>{}, RuleTag<kMomentum>{});
    case kAdam:
      return narrow ? run(DtypeTag<T>{}, DtypeTag<kBFloat16>{}, RuleTag<kAdam>{})
                    : run(DtypeTag<T>{}, DtypeTag<kFloat32>{}, RuleTag<kAdam>{});
  }
}

// Calls run(weight, state, rule), types whose `value` are the dtypes and the rule of the pass.
template <class Run>
void with_types(const PassArgs& a, Dtype dtype, Dtype state, const Run& run) {
  switch (dtype) {
    case kFloat32:
      return with_rule<kFloat32>(a, state, run);
    case kBFloat16:
      return with_rule<kBFloat16>(a, state, run);
    case kFloat16:
      return with_rule<kFloat16>(a, state, run);
    case kFloat64:
      break;  // no weight has it
  }
}

void pass(const PassArgs& a, const TensorArgs& t, Dtype dtype, Dtype state, int64_t begin, int64_t end) {
  with_types(a, dtype, state, [&](auto weight, auto kept, auto rule) {
    pass_tensor<weight.value, kept.value, rule.value>(a, t, begin, end);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
