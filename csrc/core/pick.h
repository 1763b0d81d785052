#pragma once
// What one element has of its counter: for drivers whose lanes hold elements that are no neighbours, so that each lane
// has a counter of its own. The same bits as where whole counters are drawn.
#include "core/normal.h"
#include "core/rademacher.h"

namespace pyzo {

// The words of each lane's block, given as the low and high half of a 64-bit number.
template <class L>
PYZO_HD Words<typename L::U> words_at(Source s, Stream stream, typename L::U low, typename L::U high) {
  const uint64_t upper = s.key << 8 | uint64_t(stream);
  return philox<L>({low, high, L::splat(uint32_t(upper)), L::splat(uint32_t(upper >> 32))}, s.seed);
}

// A global index, as the low and high half of its 64 bits.
template <class L>
struct Index {
  typename L::U low, high;

  // The words of the block of 2^kShift elements that the element lies in.
  template <int kShift>
  PYZO_HD Words<typename L::U> words(Source s, Stream stream) const {
    return words_at<L>(s, stream, low >> kShift | high << (32 - kShift), high >> kShift);
  }
};

// Word k of the four, k < 4.
template <class L>
PYZO_HD typename L::U pick_word(const Words<typename L::U>& w, typename L::U k) {
  using U = typename L::U;
  const U even = L::below(k, L::splat(2u), w.x, w.z), odd = L::below(k, L::splat(2u), w.y, w.w);
  return L::below(k & L::splat(1u), L::splat(1u), even, odd);
}

template <class L>
PYZO_HD typename L::F pick_normal(Source s, const Index<L>& index) {
  static_assert(kNormalPerCounter == 1 << 2);
  using F = typename L::F;
  using U = typename L::U;
  const Words<U> w = index.template words<2>(s, kNormalStream);
  const U pair = index.low & L::splat(2u);  // 0: the first
  const F r = radius<L>(L::below(pair, L::splat(2u), w.x, w.z));
  F cosine, sine;
  direction_of<L>(L::below(pair, L::splat(2u), w.y, w.w), cosine, sine);
  return r * L::if_below(index.low & L::splat(1u), L::splat(1u), cosine, sine);
}

template <class L>
PYZO_HD typename L::F pick_sign(Source s, const Index<L>& index) {
  static_assert(kRademacherPerCounter == 1 << 7);
  using U = typename L::U;
  const U word = pick_word<L>(index.template words<7>(s, kRademacherStream), index.low >> 5 & L::splat(3u));
  return sign_at_top<L>(word << (L::splat(31u) - (index.low & L::splat(31u))));
}

template <class L>
PYZO_HD typename L::F pick_noise(int distribution, Source s, const Index<L>& index) {
  return distribution == kNormal ? pick_normal<L>(s, index) : pick_sign<L>(s, index);
}

// 16 bits, of the rounding or the mask stream.
template <class L>
PYZO_HD typename L::U pick_bits(Source s, Stream stream, const Index<L>& index) {
  static_assert(kBitsPerCounter == 1 << 3);
  using U = typename L::U;
  const U word = pick_word<L>(index.template words<3>(s, stream), index.low >> 1 & L::splat(3u));
  return word >> ((index.low & L::splat(1u)) << 4) & L::splat(0xffffu);
}

}  // namespace pyzo
