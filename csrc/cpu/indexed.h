// The pass of one instruction set over listed elements: their noise is drawn lane by lane, each with a counter of its
// own, their weights are brought together in L1, where the pass over tiles works on them, and back. Included once by
// each cpu/isa_*.cpp; lies in that file's own namespace like lanes.h.
#include "core/pick.h"
#include "cpu/tile.h"

namespace pyzo::cpu::PYZO_ISA {

// Where up to kTile listed elements lie in the field. While noise is drawn, their weights are fetched: the memory,
// which answers after hundreds of instructions, works meanwhile.
struct Listed {
  alignas(64) uint32_t low[kTile], high[kTile];  // of their global indices
  const char* weights;
  int64_t size;  // of a weight
  const int64_t* indices;
  int64_t n;
  mutable int64_t fetched;

  void place(const Shard& shard, const int64_t* list, int64_t count) {
    indices = list, n = count, fetched = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t global = shard.global(indices[i]);
      low[i] = uint32_t(global), high[i] = uint32_t(global >> 32);
    }
    for (int64_t i = n; i % kLanes != 0; ++i) low[i] = high[i] = 0;
  }

  Index<Lanes> at(int64_t i) const {
    Index<Lanes> index;
    __builtin_memcpy(&index.low, low + i, sizeof index.low);
    __builtin_memcpy(&index.high, high + i, sizeof index.high);
    return index;
  }
  void fetch(int64_t end) const {
    for (end = end < n ? end : n; fetched < end; ++fetched) __builtin_prefetch(weights + indices[fetched] * size, 1);
  }

  void noise(int distribution, Source s, int64_t first, int64_t last, Tile& tile) const {
    for (int64_t i = first; i < last; i += kLanes) {
      fetch(i + kLanes);
      tile.at(i) = pick_noise<Lanes>(distribution, s, at(i));
    }
  }
  void random(Source s, Stream stream, uint32_t flip, int64_t first, int64_t last, RandomBits& out) const {
    const U flipped = Lanes::splat(flip & 0xffffu);
    for (int64_t i = first; i < last; i += kLanes)
      Lanes::store_u16(out.bits + i, pick_bits<Lanes>(s, stream, at(i)) ^ flipped);
  }
};

template <Dtype T, Dtype S, int kRule>
void pass_list(const PassArgs& a, const IndexedArgs& t, int64_t begin, int64_t end) {
  using Code = std::conditional_t<T == kFloat32, uint32_t, uint16_t>;
  constexpr int64_t kStateSize = S == kFloat32 ? 4 : 2;
  const TensorPass<kRule> pass = pass_over<T, S, kRule>(a, t, mask_of(a, t));
  Code* const dst = static_cast<Code*>(t.dst);
  TileNoise noise;
  Listed listed;
  listed.weights = static_cast<const char*>(t.dst), listed.size = sizeof(Code);
  alignas(64) Code gathered[kTile];
  for (; begin < end; begin += kTile) {
    const int64_t n = end - begin < kTile ? end - begin : kTile;
    const int64_t* const indices = t.indices + begin;
    listed.place(t.shard, indices, n);
    noise.draw(pass, listed, 0, n);
    char* const to = reinterpret_cast<char*>(gathered);
    const char* src = to;
    if (t.src)
      src = static_cast<const char*>(t.src) + begin * int64_t(sizeof(Code));
    else
      for (int64_t i = 0; i < n; ++i) gathered[i] = dst[indices[i]];
    char* state[kMaxStates] = {};
    for (int k = 0; k < RuleOf<Lanes, kRule>::type::kStates; ++k)
      state[k] = static_cast<char*>(t.state[k]) + begin * kStateSize;
    uint16_t* const low = pass.split ? t.low + begin : nullptr;
    if constexpr (kRounds<T, S, kRule>) {
      if (pass.stochastic)
        apply_any<T, S, true>(pass, noise, src, to, state, low, 0, n);
      else
        apply_any<T, S, false>(pass, noise, src, to, state, low, 0, n);
    } else {
      apply_any<T, S, false>(pass, noise, src, to, state, low, 0, n);
    }
    for (int64_t i = 0; i < n; ++i) dst[indices[i]] = gathered[i];
  }
}

void pass_indexed(const PassArgs& a, const IndexedArgs& t, Dtype dtype, Dtype state, int64_t begin, int64_t end) {
  with_types(a, dtype, state, [&](auto weight, auto kept, auto rule) {
    pass_list<weight.value, kept.value, rule.value>(a, t, begin, end);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
