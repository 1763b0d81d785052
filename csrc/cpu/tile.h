// Driver of one instruction set: cuts tensors into runs and tiles, fills noise tile by tile into L1, applies the pass.
// Included once by each cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
#include "core/normal.h"
#include "core/rademacher.h"
#include "cpu/isa.h"
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

struct alignas(64) RandomBits {
  uint16_t bits[kTile];
};

// The words of kLanes counters from `block`, in memory order.
PYZO_HD void words_in_order(Source s, Stream stream, uint64_t block, F out[4]) {
  const Words<U> w = field_words<Lanes>(s, stream, block, Lanes::counter_offsets());
  out[0] = Lanes::as_f(w.x), out[1] = Lanes::as_f(w.y), out[2] = Lanes::as_f(w.z), out[3] = Lanes::as_f(w.w);
  Lanes::transpose(out);
}

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
    words_in_order(s, kRademacherStream, (start + uint64_t(step)) / kRademacherPerCounter, words);
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

inline void fill_bits(Source s, uint64_t start, int64_t first, int64_t last, RandomBits& out) {
  constexpr int64_t kStep = kRoundingPerCounter * kLanes;
  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    F words[4];
    words_in_order(s, kRoundingStream, (start + uint64_t(i)) / kRoundingPerCounter, words);
    __builtin_memcpy(out.bits + i, words, sizeof words);
  }
}

// The noise of a tile as a pass needs it.
struct TileNoise {
  Tile undo, estimate, perturb;
  RandomBits rounding;
  const Tile *u, *p;  // where undo's and perturb's noise is
};

template <Dtype T, bool kUndo, bool kUpdate, bool kPerturb, bool kStochastic>
void apply(const PassScalars& scalars, const TileNoise& noise, float scale, const char* src, char* dst, int64_t first,
           int64_t last) {
  const PassLanes<Lanes> s(scalars);
  const F c = Lanes::splat(scale);
  const Tile* const zu = noise.u;
  const Tile* const zp = noise.p;
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2;
  // src and dst point at the tile's element 0, which may lie before the tensor's first: only [first, last) is touched.
  const auto result = [&](int64_t i, const void* from, int64_t at) {  // of the vector at i
    const F w = Lanes::load<T>(from, at);
    F undo{}, g{}, perturb{};
    U random{};
    if constexpr (kUndo) undo = zu->v[uint64_t(i) / kLanes];
    if constexpr (kUpdate) g = c * noise.estimate.v[uint64_t(i) / kLanes];
    if constexpr (kPerturb) perturb = zp->v[uint64_t(i) / kLanes];
    if constexpr (kStochastic) random = Lanes::load_u16(noise.rounding.bits + i);
    return pass_element<Lanes, T, kUndo, kUpdate, kPerturb, kStochastic>(w, undo, g, perturb, random, s);
  };
  const auto some = [&](int64_t i, int64_t from, int64_t to) {  // part of the vector at i
    alignas(64) char buffer[4 * kLanes] = {};
    __builtin_memcpy(buffer + (from - i) * kSize, src + from * kSize, (to - from) * kSize);
    Lanes::store<T>(buffer, 0, result(i, buffer, 0));
    __builtin_memcpy(dst + from * kSize, buffer + (from - i) * kSize, (to - from) * kSize);
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
    const F a = result(i, src, i), b = result(i + kLanes, src, i + kLanes);
    Lanes::store2<T>(dst, i, a, b);
  }
  if (i + kLanes <= last) {
    Lanes::store<T>(dst, i, result(i, src, i));
    i += kLanes;
  }
  if (i < last) some(i, i, last);
}

template <Dtype T, bool kUndo, bool kUpdate, bool kPerturb>
void apply_rounded(bool stochastic, const PassScalars& s, const TileNoise& noise, float scale, const char* src,
                   char* dst, int64_t first, int64_t last) {
  if constexpr (kUpdate && T != kFloat32) {
    if (stochastic) return apply<T, kUndo, kUpdate, kPerturb, true>(s, noise, scale, src, dst, first, last);
  }
  apply<T, kUndo, kUpdate, kPerturb, false>(s, noise, scale, src, dst, first, last);
}

template <Dtype T>
void pass_run(const PassArgs& a, const PassScalars& s, bool update, uint64_t key, int64_t row, const char* src,
              char* dst, uint64_t global, int64_t n) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2;
  const bool undo = a.undo >= 0, perturb = a.perturb >= 0;
  const bool stochastic = update && a.stochastic && T != kFloat32;
  TileNoise noise;
  for (int64_t done = 0; done < n;) {
    const uint64_t index = global + uint64_t(done);
    const uint64_t start = index / kTile * kTile;
    const int64_t first = int64_t(index - start);
    const int64_t last = first + (n - done) < kTile ? first + (n - done) : kTile;
    float scale = 1.0f;
    noise.u = &noise.undo, noise.p = &noise.perturb;
    if (update && a.directions == 1) {  // one direction serves everything that names it
      fill(a.distribution, {a.control.seed(0), key}, start, first, last, noise.estimate);
      scale = a.control.coefficient(row, 0);
      if (a.undo == 0) noise.u = &noise.estimate;
      if (a.perturb == 0) noise.p = &noise.estimate;
    } else if (update) {
      for (int j = 0; j < a.directions; ++j) {
        Tile& z = j == a.undo ? noise.undo : noise.perturb;
        fill(a.distribution, {a.control.seed(j), key}, start, first, last, z);
        const F c = Lanes::splat(a.control.coefficient(row, j));
        for (int64_t k = first / kLanes; k * kLanes < last; ++k)
          noise.estimate.v[k] = j == 0 ? c * z.v[k] : Lanes::fma(c, z.v[k], noise.estimate.v[k]);
      }
    }
    if (undo && noise.u == &noise.undo && !(update && a.undo < a.directions))
      fill(a.distribution, {a.control.seed(a.undo), key}, start, first, last, noise.undo);
    if (perturb && noise.p == &noise.perturb) {
      if (undo && a.perturb == a.undo)
        noise.p = noise.u;
      else
        fill(a.distribution, {a.control.seed(a.perturb), key}, start, first, last, noise.perturb);
    }
    if (stochastic) fill_bits({a.control.rounding_seed(), key}, start, first, last, noise.rounding);

    const char* from = src + (done - first) * kSize;
    char* to = dst + (done - first) * kSize;
    const int which = (undo ? 4 : 0) | (update ? 2 : 0) | (perturb ? 1 : 0);
    switch (which) {
#define PYZO_CASE(bits, undo, update, perturb)                                                   \
  case bits:                                                                                     \
    apply_rounded<T, undo, update, perturb>(stochastic, s, noise, scale, from, to, first, last); \
    break;
      PYZO_CASE(0, false, false, false)
      PYZO_CASE(1, false, false, true)
      PYZO_CASE(2, false, true, false)
      PYZO_CASE(3, false, true, true)
      PYZO_CASE(4, true, false, false)
      PYZO_CASE(5, true, false, true)
      PYZO_CASE(6, true, true, false)
      PYZO_CASE(7, true, true, true)
#undef PYZO_CASE
    }
    done += last - first;
  }
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

template <Dtype T>
void pass_tensor(const PassArgs& a, const TensorArgs& t, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2;
  const PassScalars s(a, t.row);
  const bool update = updates(a);
  for_runs(t.shard, begin, end, [&](int64_t i, uint64_t global, int64_t n) {
    pass_run<T>(a, s, update, t.key, t.row, static_cast<const char*>(t.src) + i * kSize,
                static_cast<char*>(t.dst) + i * kSize, global, n);
  });
}

void pass(const PassArgs& a, const TensorArgs& t, Dtype dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32:
      return pass_tensor<kFloat32>(a, t, begin, end);
    case kBFloat16:
      return pass_tensor<kBFloat16>(a, t, begin, end);
    case kFloat16:
      return pass_tensor<kFloat16>(a, t, begin, end);
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
  }
}

}  // namespace pyzo::cpu::PYZO_ISA
