#pragma once
// Which elements a mask lets move: by 16 bits of the noise field, by magnitude, and by a packed list of bits, where
// local element 8 j + k of a tensor is bit k of byte j.
#include "core/field.h"
#include "core/rounding.h"

namespace pyzo {

PYZO_HD int64_t mask_bytes(int64_t n) { return (n + 7) / 8; }
PYZO_HD bool mask_bit(const uint8_t* packed, int64_t i) { return (packed[i / 8] >> (i % 8) & 1) != 0; }

// Magnitudes are compared as integers, which orders all of them, subnormals and NaNs (above infinity) too.
constexpr int32_t kAnyMagnitude = 0x7fffffff;

// The largest magnitude that a threshold keeps; -1: it keeps none (it is negative or NaN).
PYZO_HD int32_t largest_kept(float threshold) {
  return threshold >= 0.0f ? int32_t(bits<uint32_t>(threshold) & 0x7fffffffu) : -1;
}

// |w| <= threshold ? yes : no, with `most` from largest_kept, or kAnyMagnitude for a yes anyway.
template <class L>
PYZO_HD typename L::F if_small(typename L::F w, int32_t most, typename L::F yes, typename L::F no) {
  return L::if_at_most(magnitude<L>(w), most, yes, no);
}

}  // namespace pyzo
