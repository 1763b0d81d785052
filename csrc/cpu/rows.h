// The pass of one instruction set over looked-up rows. They lie one after another in memory, where the pass over tiles
// works on them, but apart in the field: the noise of a tile is put together from that of its pieces. Included once by
// each cpu/isa_*.cpp after its tiles (cpu/tile.h); lies in that file's own namespace.
#include "core/pick.h"

namespace pyzo::cpu::PYZO_ISA {

// Elements [first, last) of a tile, which are neighbours in the field: from local index `local` of the matrix and
// global index `global` on.
struct Piece {
  int64_t first, last, local;
  uint64_t global;

  // Whether what is made in steps of so many elements can be made in the tile itself, since it begins with this piece.
  // What a last step makes too much is overwritten by the next piece.
  bool starts_step(int64_t step) const { return first % step == 0 && global % uint64_t(step) == 0; }
  uint64_t start() const { return global - uint64_t(first); }  // global index of the tile's element 0, were it there
};

// Where up to kTile elements of looked-up rows lie in the field.
struct Pieces {
  static constexpr int kMost = 64;  // where rows are short, a tile is not filled
  static constexpr int kMostCounters = int(kTile) / kRademacherPerCounter + 2 * kMost;
  static constexpr int kCounterBytes = kRademacherPerCounter / 8;

  Piece pieces[kMost];
  int count;

  const Piece* begin() const { return pieces; }
  const Piece* end() const { return pieces + count; }

  // As many elements of [from, to) of the rows as a tile takes; returns how many.
  int64_t find(const RowsArgs& t, int64_t from, int64_t to) {
    int64_t n = 0, row = from / t.width, column = from % t.width;
    for (count = 0; from + n < to && n < kTile && count < kMost; ++count) {
      const int64_t local = t.ids[row] * t.width + column;
      const int64_t room = to - (from + n) < kTile - n ? to - (from + n) : kTile - n;
      const int64_t length = run_length(t.shard, local, local + (room < t.width - column ? room : t.width - column));
      pieces[count] = {n, n + length, local, t.shard.global(local)};
      n += length, column += length;
      if (column == t.width) ++row, column = 0;
    }
    return n;
  }

  void noise(int distribution, Source s, int64_t, int64_t, Tile& tile) const {
    if (distribution == kRademacher) return fill_signs(s, tile);
    Tile apart;
    for (const Piece& p : *this) {
      if (p.starts_step(kNormalPerCounter * kLanes))
        fill_normal(s, p.start(), p.first, p.last, tile);
      else
        for_tiles(p.global, p.last - p.first, [&](uint64_t start, int64_t first, int64_t last, int64_t done) {
          fill_normal(s, start, first, last, apart);
          copy(&apart, first, last, &tile, p.first + done, sizeof(float));
        });
    }
  }

  void random(Source s, Stream stream, uint32_t flip, int64_t, int64_t, RandomBits& out) const {
    RandomBits apart;
    for (const Piece& p : *this) {
      if (p.starts_step(kBitsPerCounter * kLanes))
        fill_bits<Lanes>(s, stream, flip, p.start(), p.first, p.last, out);
      else
        for_tiles(p.global, p.last - p.first, [&](uint64_t start, int64_t first, int64_t last, int64_t done) {
          fill_bits<Lanes>(s, stream, flip, start, first, last, apart);
          copy(&apart, first, last, &out, p.first + done, sizeof(uint16_t));
        });
    }
  }

 private:
  // Numbers of `size` bytes.
  static void copy(const void* from, int64_t first, int64_t last, void* to, int64_t at, int64_t size) {
    __builtin_memcpy(static_cast<char*>(to) + at * size, static_cast<const char*>(from) + first * size,
                     (last - first) * size);
  }

  // The bits of all signs, a piece's from its first counter on. A row needs few counters: those of several share the
  // lanes.
  void draw_signs(Source s, char* bits) const {
    alignas(64) uint32_t low[kMostCounters + kLanes], high[kMostCounters + kLanes];
    int counters = 0;
    const auto add = [&](uint64_t block) {
      const int at = counters / kLanes * kLanes + Lanes::lane_of(counters % kLanes);
      low[at] = uint32_t(block), high[at] = uint32_t(block >> 32);
      ++counters;
    };
    for (const Piece& p : *this) {
      const uint64_t last = (p.global + uint64_t(p.last - p.first) - 1) / kRademacherPerCounter;
      for (uint64_t block = p.global / kRademacherPerCounter; block <= last; ++block) add(block);
    }
    while (counters % kLanes != 0) add(0);
    for (int i = 0; i < counters; i += kLanes) {
      U blocks[2];
      __builtin_memcpy(&blocks[0], low + i, sizeof(U));
      __builtin_memcpy(&blocks[1], high + i, sizeof(U));
      const Words<U> w = words_at<Lanes>(s, kRademacherStream, blocks[0], blocks[1]);
      F words[4] = {Lanes::as_f(w.x), Lanes::as_f(w.y), Lanes::as_f(w.z), Lanes::as_f(w.w)};
      Lanes::transpose(words);
      __builtin_memcpy(bits + i * kCounterBytes, words, sizeof words);
    }
  }

  void fill_signs(Source s, Tile& tile) const {
    char drawn[(kMostCounters + kLanes) * kCounterBytes + 8];  // a word is read from any byte on
    draw_signs(s, drawn);
    const Signs signs;
    const char* counter = drawn;
    for (const Piece& p : *this) {
      const int64_t bit = int64_t(p.global % kRademacherPerCounter), length = p.last - p.first;
      char* const to = reinterpret_cast<char*>(&tile) + p.first * 4;
      const auto word = [&](int64_t i) {  // from element i of the piece on
        const uint64_t at = uint64_t(bit + i);
        uint64_t bits;
        __builtin_memcpy(&bits, counter + at / 8, sizeof bits);
        return uint32_t(bits >> at % 8);
      };
      int64_t i = 0;
      for (; i + 32 <= length; i += 32)
        for (int k = 0; k < Signs::kVectors; ++k) {
          const F z = signs.vector(word(i), k);
          __builtin_memcpy(to + (i + k * kLanes) * 4, &z, sizeof z);
        }
      if (i < length) {
        F z[Signs::kVectors];
        for (int k = 0; k < Signs::kVectors; ++k) z[k] = signs.vector(word(i), k);
        __builtin_memcpy(to + i * 4, z, (length - i) * 4);
      }
      counter += ((bit + length - 1) / kRademacherPerCounter + 1) * kCounterBytes;
    }
  }
};

template <Dtype T, int kRule>
void pass_looked_up(const PassArgs& a, const RowsArgs& t, int64_t begin, int64_t end) {
  const TensorPass<kRule> pass = pass_over<T, kFloat32, kRule>(a, t, mask_of(a, t));
  TileNoise noise;
  Pieces pieces;
  for (int64_t n; begin < end; begin += n) {
    n = pieces.find(t, begin, end);
    noise.draw(pass, pieces, 0, n);
    if (pass.mask.packed)
      for (const Piece& p : pieces) leave_out(pass.mask.packed, p.local - p.first, p.first, p.last, noise.mask);
    char* const rows = static_cast<char*>(t.dst) + begin * (T == kFloat32 ? 4 : 2);
    apply_rounded<T, kFloat32>(pass, noise, rows, rows, nullptr, nullptr, 0, n);
  }
}

void pass_rows(const PassArgs& a, const RowsArgs& t, Dtype dtype, int64_t begin, int64_t end) {
  with_types(a, dtype, kFloat32, [&](auto weight, auto, auto rule) {
    if constexpr (RuleOf<Lanes, rule.value>::type::kStates == 0)
      pass_looked_up<weight.value, rule.value>(a, t, begin, end);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
