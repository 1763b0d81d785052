// Noise of one instruction set, tile by tile: into L1 for a pass, or rounded into a tensor. Included once by each
// cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
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

  // The vector of elements [i, i + kLanes), i a multiple of kLanes: by its address, which v[i / kLanes] would compute.
  const F& at(int64_t i) const { return *reinterpret_cast<const F*>(reinterpret_cast<const char*>(v) + i * 4); }
  F& at(int64_t i) { return *reinterpret_cast<F*>(reinterpret_cast<char*>(v) + i * 4); }
};

inline void fill_normal(Source s, uint64_t start, int64_t first, int64_t last, Tile& tile) {
  constexpr int64_t kStep = kNormalPerCounter * kLanes;
  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    const Words<U> w =
        field_words<Lanes>(s, kNormalStream, (start + uint64_t(i)) / kNormalPerCounter, Lanes::counter_offsets());
    F z[4];
    normal4<Lanes>(w, z);
    Lanes::transpose(z);
    for (int k = 0; k < 4; ++k) tile.at(i + k * kLanes) = z[k];
  }
}

// The signs of 32 neighbours from their bits.
struct Signs {
  static constexpr int kVectors = 32 / kLanes;
  U shift[kVectors];  // brings each lane's bit to the sign

  Signs() {
    for (int k = 0; k < kVectors; ++k) shift[k] = Lanes::splat(31u - uint32_t(k * kLanes)) - Lanes::iota();
  }
  F vector(uint32_t word, int k) const { return sign_at_top<Lanes>(Lanes::splat(word) << shift[k]); }
};

inline void fill_rademacher(Source s, uint64_t start, int64_t first, int64_t last, Tile& tile) {
  static_assert(kTile % kRademacherPerCounter == 0);
  constexpr int64_t kStep = int64_t(kRademacherPerCounter) * kLanes;
  const Signs signs;
  for (int64_t step = first / kStep * kStep; step < last; step += kStep) {
    F words[4];
    uint32_t word[4 * kLanes];
    words_in_order<Lanes>(s, kRademacherStream, (start + uint64_t(step)) / kRademacherPerCounter, words);
    __builtin_memcpy(word, words, sizeof word);
    const int64_t end = last < step + kStep ? last : step + kStep;
    for (int64_t w = (first > step ? first - step : 0) / 32; step + 32 * w < end; ++w)
      for (int k = 0; k < Signs::kVectors; ++k) tile.at(step + 32 * w + k * kLanes) = signs.vector(word[w], k);
  }
}

// Where the elements of a tile lie in the field: one after another from global index `start` on, a multiple of kTile.
struct Neighbours {
  uint64_t start;

  void noise(int distribution, Source s, int64_t first, int64_t last, Tile& tile) const {
    if (distribution == kNormal)
      fill_normal(s, start, first, last, tile);
    else
      fill_rademacher(s, start, first, last, tile);
  }
  void random(Source s, Stream stream, uint32_t flip, int64_t first, int64_t last, RandomBits& out) const {
    fill_bits<Lanes>(s, stream, flip, start, first, last, out);
  }
};

// How many elements of [begin, end) from the first on are contiguous in the global index.
inline int64_t run_length(const Shard& shard, int64_t begin, int64_t end) {
  const int64_t left = shard.inner <= 0 ? end - begin : shard.inner - begin % shard.inner;
  return left < end - begin ? left : end - begin;
}

// Calls run(local begin, global begin, length) for each stretch of [begin, end) that is contiguous in the global index.
template <class Run>
void for_runs(const Shard& shard, int64_t begin, int64_t end, const Run& run) {
  while (begin < end) {
    const int64_t n = run_length(shard, begin, end);
    run(begin, shard.global(begin), n);
    begin += n;
  }
}

// Calls run(start, first, last, done) for each tile of n neighbours from a global index on: elements [first, last) of
// the tile that begins at `start`, after `done` others.
template <class Run>
void for_tiles(uint64_t global, int64_t n, const Run& run) {
  for (int64_t done = 0; done < n;) {
    const uint64_t index = global + uint64_t(done), start = index / kTile * kTile;
    const int64_t first = int64_t(index - start);
    const int64_t last = first + (n - done) < kTile ? first + (n - done) : kTile;
    run(start, first, last, done);
    done += last - first;
  }
}

template <Dtype T>
void noise_tensor(Source source, Shard shard, int distribution, char* out, int64_t begin, int64_t end) {
  constexpr int64_t kSize = T == kFloat32 ? 4 : 2;
  Tile tile;
  for_runs(shard, begin, end, [&](int64_t local, uint64_t global, int64_t n) {
    for_tiles(global, n, [&](uint64_t start, int64_t first, int64_t last, int64_t done) {
      Neighbours{start}.noise(distribution, source, first, last, tile);
      alignas(64) char rounded[kTile * kSize];
      for (int64_t k = first / kLanes; k * kLanes < last; ++k)
        Lanes::store<T>(rounded, k * kLanes, to_storage<Lanes, T>(tile.v[k]));
      __builtin_memcpy(out + (local + done) * kSize, rounded + first * kSize, (last - first) * kSize);
    });
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
