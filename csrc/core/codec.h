#pragma once
// Codes of activations: k bits that say between which thresholds an element lies, and the slope that stands for the
// derivative there (Few-Bit Backward, arXiv 2202.00441; LowMemoryBP, arXiv 2406.16282, section 4). Element i of a
// tensor has bits k i to k i + k - 1 of the codes, counted from the lowest bit of byte 0.
#include "core/lane.h"

namespace pyzo {

constexpr int kMaxBits = 4;

// Thresholds, in increasing order (2^bits - 1), or slopes (2^bits).
struct Levels {
  int bits;
  float level[1 << kMaxBits];
};

PYZO_HD int64_t code_bytes(int64_t n, int bits) { return (n * bits + 7) / 8; }

// The number of thresholds below x; 0 for NaN.
template <class L, int kBits>
PYZO_HD typename L::U code_of(typename L::F x, const Levels& thresholds) {
  typename L::U code = L::splat(uint32_t(0));
  PYZO_UNROLL
  for (int i = 0; i < (1 << kBits) - 1; ++i) code += L::above(x, L::splat(thresholds.level[i]));
  return code;
}

}  // namespace pyzo
