#pragma once
// The noise field, version 1: how seeds, tensor keys, streams and element indices become Philox keys and counters.
//   key     = the direction's 64-bit seed
//   counter = low 64 bits: block of elements; high 64 bits: 56-bit tensor key << 8 | 8-bit stream
// Frozen: a change of any line here or in philox.h, normal.h, rademacher.h is a new version.
#include "core/philox.h"

namespace pyzo {

constexpr int kNoiseVersion = 1;

enum Stream : uint32_t {
  kNormalStream = 0,
  kRademacherStream = 1,
  kRoundingStream = 2,
  kMaskStream = 3,
  kDropoutStream = 4,
};
enum Distribution : int { kNormal = 0, kRademacher = 1 };

constexpr int kNormalPerCounter = 4;        // four normals from two word pairs
constexpr int kRademacherPerCounter = 128;  // one sign per bit
constexpr int kBitsPerCounter = 8;          // 16 bits each: rounding, masks, dropout
constexpr uint32_t kKeepAll = 65536;        // masks and dropout keep what has bits below a number up to this

// What a tensor's noise is a function of, besides the element index.
struct Source {
  uint64_t seed, key;
};

// Words of the blocks block | offset, where block is a multiple of a power of two above every lane's offset.
template <class L>
PYZO_HD Words<typename L::U> field_words(Source s, Stream stream, uint64_t block, typename L::U offset) {
  const uint64_t high = s.key << 8 | uint64_t(stream);
  return philox<L>({L::splat(uint32_t(block)) | offset, L::splat(uint32_t(block >> 32)), L::splat(uint32_t(high)),
                    L::splat(uint32_t(high >> 32))},
                   s.seed);
}

// A shard is a rectangle of a tensor: local element i is element base + (i / inner) * stride + i % inner of the whole.
// inner <= 0 means that the shard is one run (inner = its size).
struct Shard {
  int64_t base, inner, stride;
  PYZO_HD uint64_t global(int64_t i) const {
    if (inner <= 0) return uint64_t(base) + uint64_t(i);
    return uint64_t(base) + uint64_t(i / inner) * uint64_t(stride) + uint64_t(i % inner);
  }
};

// 64-bit finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection.
PYZO_HD uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Seed of direction k of step t of a run. For fixed run and t distinct k give distinct seeds, and the other way round.
PYZO_HD uint64_t direction_seed(uint64_t run, uint64_t t, uint64_t k) {
  const uint64_t step = mix64(mix64(run + 0x9E3779B97F4A7C15u) + t * 0xD1B54A32D192ED03u);
  return mix64(step + k * 0x9E3779B97F4A7C15u);
}

constexpr uint64_t kRoundingDirection = 0xFFFFFFFFFFFFFFFFu;  // its seed feeds the stochastic rounding of the step
constexpr uint64_t kMaskDirection = 0xFFFFFFFFFFFFFFFEu;      // its seed draws the masks of the step

}  // namespace pyzo
