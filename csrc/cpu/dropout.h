// Kernel of dropout. Included once by each cpu/layers_*.cpp; lies in that file's own namespace.
#include "body/dropout.h"
#include "cpu/bits.h"

namespace pyzo::cpu::PYZO_ISA {

static_assert(kLayerTile == kTile, "a layer's tile takes the bits of one tile of the field");

inline void dropout(const Elements& e, const Dropout& d, uint64_t seed, int64_t begin, int64_t end) {
  const F scale = constant<Lanes>(d.scale);
  const U keep = Lanes::splat(d.keep);
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    LayerTile x;
    RandomBits random;
    fill_bits<Lanes>({seed, 0}, kDropoutStream, 0u, uint64_t(i), 0, n, random);
    load_tile(e.dtype, e.in[0], i, n, x);
    for (int64_t k = 0; k * kLanes < n; ++k)
      x.v[k] = drop<Lanes>(x.v[k], Lanes::load_u16(random.bits + k * kLanes), keep, scale);
    store_tile(e.dtype, e.out, i, n, x);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
