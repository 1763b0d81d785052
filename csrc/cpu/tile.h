// Driver of one instruction set: cuts tensors into runs and tiles, fills noise tile by tile into L1, applies the pass.
// Included once by each cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
#include "core/normal.h"
#include "core/rademacher.h"
#include "cpu/bits.h"
#include "cpu/lanes.h"

namespace pyzo::cpu::PYZO_ISA {

using F = Lanes::F;
using U = Lanes::U;

// One tile of noise, kTile elements from global index `start` (a multiple of kTile), only where [first, last) asks for
// it.
constexpr int kVectors = int(kTile) / kLanes;

struct alignas(64) Tile {
  F v[kVectors];
};

inline void fill_normal(Source s, uint64_t start, int64_t first, int64_t last, Tile& tile) {
  constexpr int64_t kStep = kNormalPerCounter * kLanes;
  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    const Words<U> w =
        field_words<Lanes>(s, kNormalStream, (start + uint64_t(i)) / kNormalPerCounter, Lanes::counter_offsets());
    F z[4];
    normal4<Lanes>(w, z);
    Lanes::transpose(z);
    for (int k = 0; k < 4; ++k) tile.v[i / kLanes + k] = z[k];
  }
}

inline void fill_rademacher(Source s, uint64_t start, int64_t first, int64_t last, Tile& tile) {
  static_assert(kTile % kRademacherPerCounter == 0);
  constexpr int64_t kStep = int64_t(kRademacherPerCounter) * kLanes;
  constexpr int kPerWord = 32 / kLanes;  // vectors
  U shift[kPerWord];                     // brings each lane's bit to the sign
  for (int k = 0; k < kPerWord; ++k) shift[k] = Lanes::splat(31u - uint32_t(k * kLanes)) - Lanes::iota();
  for (int64_t step = first / kStep * kStep; step < last; step += kStep) {
    F words[4];
    uint32_t word[4 * kLanes];
    words_in_order<Lanes>(s, kRademacherStream, (start + uint64_t(step)) / kRademacherPerCounter, words);
    __builtin_memcpy(word, words, sizeof word);
    const int64_t end = last < step + kStep ? last : step + kStep;
    for (int64_t w = (first > step ? first - step : 0) / 32; step + 32 * w < end; ++w)
      for (int k = 0; k < kPerWord; ++k)
        tile.v[(step + 32 * w) / kLanes + k] = sign_at_top<Lanes>(Lanes::splat(word[w]) << shift[k]);
  }
}

inline void fill(int distribution, Source s, uint64_t start, int64_t first, int64_t last, Tile& tile) {
  if (distribution == kNormal)
    fill_normal(s, start, first, last, tile);
  else
    fill_rademacher(s, start, first, last, tile);
}

constexpr uint16_t kNeverKept = 0xffff;

// What one tensor's share of a pass is, the same for all its tiles.
template <int kRule>
struct TensorPass {
  const PassArgs& a;
  const TensorArgs& t;
  PassLanes<Lanes, kRule> lanes;
  bool update, stochastic;
  Mask mask;
  bool masked;
};

// What a packed mask leaves out gets mask bits that no threshold keeps. origin: local index of the tile's element 0.
inline void leave_out(const uint8_t* packed, int64_t origin, int64_t first, int64_t last, RandomBits& mask) {
  typedef uint16_t Eight __attribute__((vector_size(16)));
  constexpr Eight kPlace = {1, 2, 4, 8, 16, 32, 64, 128};
  const auto one = [&](int64_t i) {
    if (!mask_bit(packed, origin + i)) mask.bits[i] = kNeverKept;
  };
  int64_t i = first;
  for (; i < last && (origin + i) % 8 != 0; ++i) one(i);
  for (; i + 8 <= last; i += 8) {
    Eight bits;
    __builtin_memcpy(&bits, mask.bits + i, sizeof bits);
    bits |= (Eight)((kPlace & uint16_t(packed[(origin + i) / 8])) == 0);
    __builtin_memcpy(mask.bits + i, &bits, sizeof bits);
  }
  for (; i < last; ++i) one(i);
}

// The noise of a tile as a pass needs it.
struct TileNoise {
  Tile undo, estimate, perturb;
  RandomBits rounding;
  RandomBits mask;    // of what the mask keeps they are below min(keep, kNeverKept); magnitudes are not in it
  const Tile *u, *p;  // where undo's and perturb's noise is
  float scale;        // of the estimate

  template <int kRule>
  void draw(const TensorPass<kRule>& pass, uint64_t start, int64_t origin, int64_t first, int64_t last);
};

template <int kRule>
void TileNoise::draw(const TensorPass<kRule>& pass, uint64_t start, int64_t origin, int64_t first, int64_t last) {
  const PassArgs& a = pass.a;
  const auto fill_direction = [&](int j, Tile& z) {
    fill(a.distribution, {a.control.seed(j), pass.t.key}, start, first, last, z);
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
    fill_bits<Lanes>({a.control.rounding_seed(), pass.t.key}, kRoundingStream, a.retract ? 0xffffffffu : 0u, start,
                     first, last, rounding);
  if (!pass.masked) return;
  if (pass.mask.keep < kKeepAll)
    fill_bits<Lanes>({a.control.mask_seed(pass.t.row), pass.t.key}, kMaskStream, 0u, start, first, last, mask);
  else
    mask = {};
  if (pass.mask.packed) leave_out(pass.mask.packed, origin, first, last, mask);
}

// Bits of `kDoes`: what a pass does is known when compiled (kKnown), or read from its arguments.
enum Does : int { kPerturbs = 1, kUpdates = 2, kUndoes = 4, kKnown = 8 };

// Elements [first, last) of a tile. Pointers stand at the tile's element 0, which may lie before the tensor's first.
template <Dtype T, Dtype S, bool kStochastic, int kDoes, int kRule>
void apply(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst, char* const* state,
           int64_t first, int64_t last) {
  constexpr int kStates = RuleOf<Lanes, kRule>::type::kStates;
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kStateSize = S == kFloat32 ? 4 : 2;
  const PassLanes<Lanes, kRule> s = pass.lanes;
  const F c = Lanes::splat(noise.scale);
  const Tile *const zu = noise.u, *const zp = noise.p;
  const bool undo = kDoes & kKnown ? (kDoes & kUndoes) != 0 : pass.a.undo >= 0;
  const bool update = kDoes & kKnown ? (kDoes & kUpdates) != 0 : pass.update;
  const bool perturb = kDoes & kKnown ? (kDoes & kPerturbs) != 0 : pass.a.perturb >= 0;
  const bool masked = kDoes & kKnown ? false : pass.masked;
  const U keep = Lanes::splat(pass.mask.keep < kNeverKept ? pass.mask.keep : kNeverKept);

  struct Vector {
    F w, state[kMaxStates];
  };
  // The vector at i of the tile, whose data is `at` of the pointers.
  const auto result = [&](int64_t i, int64_t at, const void* from, const char* const* from_state) {
    const F w = Lanes::load<T>(from, at);
    const auto if_kept = [&](F yes, F no) {
      const F drawn = Lanes::if_below(Lanes::load_u16(noise.mask.bits + i), keep, yes, no);
      return if_small<Lanes>(w, pass.mask.most, drawn, no);
    };
    Vector x = {w, {}};
    if (undo) x.w = add_noise<Lanes, T>(x.w, zu->v[uint64_t(i) / kLanes], s.undo_scale);
    if (update) {
      U random{};
      if constexpr (kStochastic) random = Lanes::load_u16(noise.rounding.bits + i);
      F old[kMaxStates];
      for (int k = 0; k < kStates; ++k) x.state[k] = old[k] = Lanes::load<S>(from_state[k], at);
      x.w =
          update_element<Lanes, T, S, kStochastic>(x.w, c * noise.estimate.v[uint64_t(i) / kLanes], x.state, random, s);
      if (masked)
        for (int k = 0; k < kStates; ++k) x.state[k] = if_kept(x.state[k], old[k]);
    }
    if (perturb) x.w = add_noise<Lanes, T>(x.w, zp->v[uint64_t(i) / kLanes], s.perturb_scale);
    if (masked) x.w = if_kept(x.w, w);
    x.w = Lanes::if_changed(x.w, w);
    return x;
  };
  const auto store_state = [&](char* const* to, int64_t at, const Vector& x) {
    if (update)
      for (int k = 0; k < kStates; ++k) Lanes::store<S>(to[k], at, x.state[k]);
  };
  const auto whole = [&](int64_t i) {
    const Vector x = result(i, i, src, state);
    Lanes::store<T>(dst, i, x.w);
    store_state(state, i, x);
  };
  const auto some = [&](int64_t i, int64_t from, int64_t to) {  // part of the vector at i
    alignas(64) char buffer[4 * kLanes] = {}, state_buffer[kMaxStates][4 * kLanes] = {};
    char* at_state[kMaxStates] = {state_buffer[0], state_buffer[1]};
    __builtin_memcpy(buffer + (from - i) * kSize, src + from * kSize, (to - from) * kSize);
    for (int k = 0; k < kStates; ++k)
      __builtin_memcpy(at_state[k] + (from - i) * kStateSize, state[k] + from * kStateSize, (to - from) * kStateSize);
    const Vector x = result(i, 0, buffer, at_state);
    Lanes::store<T>(buffer, 0, x.w);
    store_state(at_state, 0, x);
    __builtin_memcpy(dst + from * kSize, buffer + (from - i) * kSize, (to - from) * kSize);
    for (int k = 0; k < kStates; ++k)
      __builtin_memcpy(state[k] + from * kStateSize, at_state[k] + (from - i) * kStateSize, (to - from) * kStateSize);
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
    const Vector x = result(i, i, src, state), y = result(i + kLanes, i + kLanes, src, state);
    Lanes::store2<T>(dst, i, x.w, y.w);
    store_state(state, i, x);
    store_state(state, i + kLanes, y);
  }
  if (i + kLanes <= last) {
    whole(i);
    i += kLanes;
  }
  if (i < last) some(i, i, last);
}

// What most steps consist of has code of its own where lanes are fast: anything that SGD may do, and the update of any
// rule with or without undo, without a mask. Every other pass decides as it runs.
template <Dtype T, Dtype S, bool kStochastic, int kRule>
void apply_known(const TensorPass<kRule>& pass, const TileNoise& noise, const char* src, char* dst, char* const* state,
                 int64_t first, int64_t last) {
  if constexpr (kLanes > 4) {
    const int does =
        (pass.a.undo >= 0 ? kUndoes : 0) | (pass.update ? kUpdates : 0) | (pass.a.perturb >= 0 ? kPerturbs : 0);
    switch (pass.masked ? -1 : does) {
#define PYZO_CASE(does)                                                              \
  case does:                                                                         \
    if constexpr (kRule == kSgd || does == kUpdates || does == (kUndoes | kUpdates)) \
      return apply < T, S, kStochastic && ((does) & kUpdates) != 0,                  \
             kKnown | does > (pass, noise, src, dst, state, first, last);            \
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
  apply<T, S, kStochastic, 0>(pass, noise, src, dst, state, first, last);
}

// Calls run(local begin, global begin, length) for each stretch of [begin, end) that is contiguous in the global index.
template <class Run>
void for_runs(const Shard& shard, int64_t begin, int64_t end, const Run& run) {
  while (begin < end) {
    const int64_t left = shard.inner <= 0 ? end - begin : shard.inner - begin % shard.inner;
    const int64_t n = left < end - begin ? left : end - begin;
    run(begin, shard.global(begin), n);
    begin += n;
  }
}

template <Dtype T, Dtype S, int kRule>
void pass_tensor(const PassArgs& a, const TensorArgs& t, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kStateSize = S == kFloat32 ? 4 : 2;
  constexpr int kStates = RuleOf<Lanes, kRule>::type::kStates;
  constexpr bool kRounds = T != kFloat32 || (kStates > 0 && S != kFloat32);  // something to 16 bits
  const bool update = updates(a);
  const bool stochastic = update && a.stochastic && kRounds;
  const Mask mask = mask_of(a, t);
  const TensorPass<kRule> pass = {a, t, {a, t.row}, update, stochastic, mask, !mask.keeps_all()};
  TileNoise noise;
  for_runs(t.shard, begin, end, [&](int64_t local, uint64_t global, int64_t n) {
    for (int64_t done = 0; done < n;) {
      const uint64_t index = global + uint64_t(done), start = index / kTile * kTile;
      const int64_t first = int64_t(index - start);
      const int64_t last = first + (n - done) < kTile ? first + (n - done) : kTile;
      const int64_t origin = local + done - first;
      noise.draw(pass, start, origin, first, last);
      const char* src = static_cast<const char*>(t.src) + origin * kSize;
      char* dst = static_cast<char*>(t.dst) + origin * kSize;
      char* state[kMaxStates] = {};
      for (int k = 0; k < kStates; ++k) state[k] = static_cast<char*>(t.state[k]) + origin * kStateSize;
      if constexpr (kRounds) {
        if (stochastic)
          apply_known<T, S, true>(pass, noise, src, dst, state, first, last);
        else
          apply_known<T, S, false>(pass, noise, src, dst, state, first, last);
      } else {
        apply_known<T, S, false>(pass, noise, src, dst, state, first, last);
      }
      done += last - first;
    }
  });
}

template <Dtype T>
void pass_of(const PassArgs& a, const TensorArgs& t, Dtype state, int64_t begin, int64_t end) {
  switch (updates(a) ? a.rule : int(kSgd)) {
    case kSgd:
      return pass_tensor<T, kFloat32, kSgd>(a, t, begin, end);
    case kSign:
      return pass_tensor<T, kFloat32, kSign>(a, t, begin, end);
    case kMomentum:
      return state == kFloat32 ? pass_tensor<T, kFloat32, kMomentum>(a, t, begin, end)
                               : pass_tensor<T, kBFloat16, kMomentum>(a, t, begin, end);
    case kAdam:
      return state == kFloat32 ? pass_tensor<T, kFloat32, kAdam>(a, t, begin, end)
                               : pass_tensor<T, kBFloat16, kAdam>(a, t, begin, end);
  }
}

void pass(const PassArgs& a, const TensorArgs& t, Dtype dtype, Dtype state, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32:
      return pass_of<kFloat32>(a, t, state, begin, end);
    case kBFloat16:
      return pass_of<kBFloat16>(a, t, state, begin, end);
    case kFloat16:
      return pass_of<kFloat16>(a, t, state, begin, end);
    case kFloat64:
      break;  // no weight has it
  }
}

template <Dtype T>
void mask_bits_tensor(const void* weights, int32_t most, uint8_t* packed, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2, kGroup = kLanes > 8 ? kLanes : 8;
  const auto bits_of = [&](const void* from, int64_t at) {
    uint32_t bits = 0;
    for (int64_t l = 0; l < kGroup; l += kLanes)
      bits |= Lanes::bits_at_most(magnitude<Lanes>(Lanes::load<T>(from, at + l)), most) << l;
    return bits;
  };
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    const uint32_t bits = bits_of(weights, i);
    __builtin_memcpy(packed + i / 8, &bits, kGroup / 8);
  }
  if (i < end) {
    alignas(64) char buffer[kGroup * kSize] = {};
    __builtin_memcpy(buffer, static_cast<const char*>(weights) + i * kSize, (end - i) * kSize);
    const uint32_t bits = bits_of(buffer, 0) & ((1u << (end - i)) - 1u);
    __builtin_memcpy(packed + i / 8, &bits, mask_bytes(end - i));
  }
}

void mask_bits(const void* weights, Dtype dtype, int32_t most, uint8_t* packed, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32:
      return mask_bits_tensor<kFloat32>(weights, most, packed, begin, end);
    case kBFloat16:
      return mask_bits_tensor<kBFloat16>(weights, most, packed, begin, end);
    case kFloat16:
      return mask_bits_tensor<kFloat16>(weights, most, packed, begin, end);
    case kFloat64:
      break;  // no weight has it
  }
}

template <Dtype T>
void noise_tensor(Source source, Shard shard, int distribution, char* out, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2;
  Tile tile;
  for_runs(shard, begin, end, [&](int64_t local, uint64_t global, int64_t n) {
    for (int64_t done = 0; done < n;) {
      const uint64_t index = global + uint64_t(done), start = index / kTile * kTile;
      const int64_t first = int64_t(index - start);
      const int64_t last = first + (n - done) < kTile ? first + (n - done) : kTile;
      fill(distribution, {source.seed, source.key}, start, first, last, tile);
      alignas(64) char rounded[kTile * kSize];
      for (int64_t k = first / kLanes; k * kLanes < last; ++k)
        Lanes::store<T>(rounded, k * kLanes, to_storage<Lanes, T>(tile.v[k]));
      __builtin_memcpy(out + (local + done) * kSize, rounded + first * kSize, (last - first) * kSize);
      done += last - first;
    }
  });
}

void noise(Source s, Shard shard, int distribution, Dtype dtype, void* out, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32:
      return noise_tensor<kFloat32>(s, shard, distribution, static_cast<char*>(out), begin, end);
    case kBFloat16:
      return noise_tensor<kBFloat16>(s, shard, distribution, static_cast<char*>(out), begin, end);
    case kFloat16:
      return noise_tensor<kFloat16>(s, shard, distribution, static_cast<char*>(out), begin, end);
    case kFloat64:
      break;  // no weight has it
  }
}

}  // namespace pyzo::cpu::PYZO_ISA
