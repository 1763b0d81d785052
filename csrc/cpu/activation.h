// Kernels of activations: values, exact derivatives, and codes. Included once by each cpu/layers_*.cpp; lies in that
// file's own namespace.
#include "cpu/codes.h"

namespace pyzo::cpu::PYZO_ISA {

// y = h(x), n numbers.
inline void values(int f, const Number* x, Number* y, int64_t n) {
  with_function(f, [&](auto tag) {
    map_numbers({x}, {y}, n, [](const F* x, F* y) { y[0] = function<Lanes, decltype(tag)::value>(x[0]).value; });
  });
}

// A tile's codes, from a number for each of its elements and of those that fill the last group.
PYZO_HD void pack(const uint32_t* code, int bits, int64_t n, uint8_t* out) {
  alignas(64) uint8_t packed[kLayerTile * kMaxBits / 8 + 8];
  const int64_t bytes = kGroup * bits / 8;
  for (int64_t g = 0; g * kGroup < n; ++g) {
    const uint64_t word = join(code + g * kGroup, bits);
    __builtin_memcpy(packed + g * bytes, &word, 8);  // little-endian, as the codes
  }
  __builtin_memcpy(out, packed, code_bytes(n, bits));
}

inline void activation(const Elements& e, int f, int64_t begin, int64_t end) {
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    LayerTile in, out;
    values(f, read_tile(e.dtype, e.in[0], i, n, in), target(e.dtype, e.out, i, out), n);
    write_tile(e.dtype, e.out, i, n, out);
  });
}

inline void activation_backward(const Elements& e, int f, int64_t begin, int64_t end) {
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    LayerTile first, second, out;
    const Number* gradient = read_tile(e.dtype, e.in[0], i, n, first);
    const Number* x = read_tile(e.dtype, e.in[1], i, n, second);
    with_function(f, [&](auto tag) {
      map_numbers({gradient, x}, {target(e.dtype, e.out, i, out)}, n,
                  [](const F* x, F* y) { y[0] = x[0] * function<Lanes, decltype(tag)::value>(x[1]).slope; });
    });
    write_tile(e.dtype, e.out, i, n, out);
  });
}

// The codes of n numbers.
template <int kBits>
void find_codes(const Number* x, const Levels& thresholds, int64_t n, uint8_t* codes) {
  alignas(64) uint32_t code[kLayerTile];
  const auto vector = [&](const Number* from, int64_t k) {
    const U c = code_of<Lanes, kBits>(Lanes::load<kNumber>(from, 0), thresholds);
    __builtin_memcpy(code + k, &c, sizeof c);
  };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) vector(x + k, k);
  if (k < n) {
    alignas(64) Number rest[kLanes] = {};
    __builtin_memcpy(rest, x + k, (n - k) * int64_t(sizeof(Number)));
    vector(rest, k);
  }
  for (k = n; k % kGroup; ++k) code[k] = 0;
  pack(code, kBits, n, codes);
}

#if PYZO_LANES >= 8
// One bit is what a comparison gives for a vector at once.
template <>
inline void find_codes<1>(const Number* x, const Levels& thresholds, int64_t n, uint8_t* codes) {
  const F threshold = Lanes::splat(thresholds.level[0]);
  constexpr int64_t kBytes = kLanes / 8;
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes, codes += kBytes) {
    const auto mask = above_mask(Lanes::load<kNumber>(x, k), threshold);
    __builtin_memcpy(codes, &mask, kBytes);
  }
  if (k < n) {
    alignas(64) Number rest[kLanes] = {};
    __builtin_memcpy(rest, x + k, (n - k) * int64_t(sizeof(Number)));
    const uint32_t mask = above_mask(Lanes::load<kNumber>(rest, 0), threshold) & ((1u << (n - k)) - 1u);
    __builtin_memcpy(codes, &mask, code_bytes(n - k, 1));
  }
}
#endif

template <int kBits>
void coded_activation_bits(const Elements& e, int f, const Levels& thresholds, uint8_t* codes, int64_t begin,
                           int64_t end) {
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    LayerTile in, out;
    const Number* x = read_tile(e.dtype, e.in[0], i, n, in);
    find_codes<kBits>(x, thresholds, n, codes + i * kBits / 8);
    values(f, x, target(e.dtype, e.out, i, out), n);
    write_tile(e.dtype, e.out, i, n, out);
  });
}

inline void coded_activation(const Elements& e, int f, const Levels& thresholds, uint8_t* codes, int64_t begin,
                             int64_t end) {
  switch (thresholds.bits) {
    case 1:
      return coded_activation_bits<1>(e, f, thresholds, codes, begin, end);
    case 2:
      return coded_activation_bits<2>(e, f, thresholds, codes, begin, end);
    case 3:
      return coded_activation_bits<3>(e, f, thresholds, codes, begin, end);
    case 4:
      return coded_activation_bits<4>(e, f, thresholds, codes, begin, end);
  }
}

// Gradient times slope, elements [begin, end).
template <Dtype T, int kBits>
void scale_by_codes(const void* gradient, const Levels& slopes, const uint8_t* codes, void* out, int64_t begin,
                    int64_t end) {
  constexpr int64_t kBytes = kGroup * kBits / 8;
  const SlopeTable<kBits> table(slopes);
  const auto group = [&](const void* from, void* to, int64_t i, uint64_t word) {
    F slope[kGroup / kLanes];
    table.look_up(word, slope);
    for (int64_t k = 0; k < kGroup / kLanes; ++k)
      Lanes::store<T>(to, i + k * kLanes, to_storage<Lanes, T>(Lanes::load<T>(from, i + k * kLanes) * slope[k]));
  };
  const uint8_t* at = codes + begin * kBits / 8;
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup, at += kBytes) {
    group(gradient, out, i, load_codes<kBytes>(at));
  }
  if (const int64_t n = end - i; n > 0) {
    alignas(64) char from[8 * kGroup] = {}, to[8 * kGroup];
    uint64_t word = 0;
    __builtin_memcpy(&word, at, code_bytes(n, kBits));
    __builtin_memcpy(from, static_cast<const char*>(gradient) + i * size_of(T), n * size_of(T));
    group(from, to, 0, word);
    __builtin_memcpy(static_cast<char*>(out) + i * size_of(T), to, n * size_of(T));
  }
}

inline void coded_activation_backward(const Elements& e, const Levels& slopes, const uint8_t* codes, int64_t begin,
                                      int64_t end) {
  with_dtype(e.dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
    switch (slopes.bits) {
      case 1:
        return scale_by_codes<T, 1>(e.in[0], slopes, codes, e.out, begin, end);
      case 2:
        return scale_by_codes<T, 2>(e.in[0], slopes, codes, e.out, begin, end);
      case 3:
        return scale_by_codes<T, 3>(e.in[0], slopes, codes, e.out, begin, end);
      case 4:
        return scale_by_codes<T, 4>(e.in[0], slopes, codes, e.out, begin, end);
    }
  });
}

inline void output_activation_backward(const Elements& e, int f, const uint8_t* sides, int64_t begin, int64_t end) {
  static constexpr Levels kBit = {1, {0.0f, 1.0f}};
  const SlopeTable<1> bit(kBit);
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    LayerTile first, second, right = {}, out;
    const Number* gradient = read_tile(e.dtype, e.in[0], i, n, first);
    const Number* y = read_tile(e.dtype, e.in[1], i, n, second);
    if (has_sides(f)) {
      int64_t k = 0;
      for (; k + kGroup <= n; k += kGroup)
        bit.look_up(load_codes<kGroup / 8>(sides + (i + k) / 8), right.v + k / kLanes);
      if (k < n) {
        uint64_t word = 0;
        __builtin_memcpy(&word, sides + (i + k) / 8, code_bytes(n - k, 1));
        bit.look_up(word, right.v + k / kLanes);
      }
    }
    with_function(f, [&](auto tag) {
      map_numbers({gradient, y, reinterpret_cast<const Number*>(right.v)}, {target(e.dtype, e.out, i, out)}, n,
                  [](const F* x, F* y) { y[0] = x[0] * slope_of_output<Lanes, decltype(tag)::value>(x[1], x[2]); });
    });
    write_tile(e.dtype, e.out, i, n, out);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
