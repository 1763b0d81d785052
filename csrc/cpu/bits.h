// 16 random bits for each element of a tile, from the noise field. Included once by each cpu/isa_*.cpp and
// cpu/layers_*.cpp, for its Lanes; lies in that file's own namespace.
#include "core/field.h"
#include "cpu/isa.h"

namespace pyzo::cpu::PYZO_ISA {

struct alignas(64) RandomBits {
  uint16_t bits[kTile];
};

// The words of as many counters from `block` on as there are lanes, in memory order.
template <class L>
PYZO_HD void words_in_order(Source s, Stream stream, uint64_t block, typename L::F out[4]) {
  const auto w = field_words<L>(s, stream, block, L::counter_offsets());
  out[0] = L::as_f(w.x), out[1] = L::as_f(w.y), out[2] = L::as_f(w.z), out[3] = L::as_f(w.w);
  L::transpose(out);
}

// 16 bits per element, or their complement where `flip` has all bits set: of elements [first, last) at least of the
// tile that begins at global index `start`.
template <class L>
void fill_bits(Source s, Stream stream, uint32_t flip, uint64_t start, int64_t first, int64_t last, RandomBits& out) {
  constexpr int64_t kStep = kBitsPerCounter * L::kWidth;
  for (int64_t i = first / kStep * kStep; i < last; i += kStep) {
    const uint64_t block = (start + uint64_t(i)) / kBitsPerCounter;
    if constexpr (L::kWidth == 1) {  // float64, whose lane is no 32-bit word
      const Words<uint32_t> w = field_words<Scalar>(s, stream, block, 0u);
      const uint32_t words[4] = {w.x ^ flip, w.y ^ flip, w.z ^ flip, w.w ^ flip};
      __builtin_memcpy(out.bits + i, words, sizeof words);
    } else {
      typename L::F words[4];
      words_in_order<L>(s, stream, block, words);
      for (auto& w : words) w = L::as_f(L::as_u(w) ^ L::splat(flip));
      __builtin_memcpy(out.bits + i, words, sizeof words);
    }
  }
}

}  // namespace pyzo::cpu::PYZO_ISA
