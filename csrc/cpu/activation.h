// Kernels of activations: values, exact derivatives, and codes. Included once by each cpu/layers_*.cpp; lies in that
// file's own namespace.
#include "cpu/codes.h"

namespace pyzo::cpu::PYZO_ISA {

inline void activation(const Elements& e, int f, int64_t begin, int64_t end) {
  with_kernel(e.dtype, f, [&](auto t, auto tag) {
    map_elements<decltype(t)::value, 1, 1>(
        {element(e.dtype, e.in[0], begin)}, {element(e.dtype, e.out, begin)}, end - begin,
        [](const F* x, F* y, auto...) { y[0] = function<Lanes, decltype(tag)::value>(x[0]).value; });
  });
}

inline void activation_backward(const Elements& e, int f, int64_t begin, int64_t end) {
  with_kernel(e.dtype, f, [&](auto t, auto tag) {
    if (e.value)
      return map_elements<decltype(t)::value, 2, 2>(
          {element(e.dtype, e.in[0], begin), element(e.dtype, e.in[1], begin)},
          {element(e.dtype, e.out, begin), element(e.dtype, e.value, begin)}, end - begin,
          [](const F* x, F* y, auto...) {
            const ValueSlope<F> h = function<Lanes, decltype(tag)::value>(x[1]);
            y[0] = x[0] * h.slope, y[1] = h.value;
          });
    map_elements<decltype(t)::value, 2, 1>(
        {element(e.dtype, e.in[0], begin), element(e.dtype, e.in[1], begin)}, {element(e.dtype, e.out, begin)},
        end - begin,
        [](const F* x, F* y, auto...) { y[0] = x[0] * function<Lanes, decltype(tag)::value>(x[1]).slope; });
  });
}

// The codes of elements [i, i + n).
template <Dtype T, int kBits>
void find_codes(const void* x, int64_t i, int64_t n, const Levels& thresholds, uint8_t* codes) {
  constexpr int64_t kBytes = kJoined * kBits / 8;
  const Coder<kBits> coder{thresholds};
  const auto group = [&](const void* from, int64_t at) {
    F v[kJoined / kLanes];
    for (int64_t k = 0; k < kJoined / kLanes; ++k) v[k] = Lanes::read<T>(from, at + k * kLanes);
    return coder(v);
  };
  int64_t k = 0;
  for (; k + kJoined <= n; k += kJoined) {
    const uint64_t word = group(x, i + k);
    __builtin_memcpy(codes + k / kJoined * kBytes, &word, kBytes);  // little-endian, as the codes
  }
  if (k < n) {
    alignas(64) char rest[kJoined * size_of(T)] = {};
    __builtin_memcpy(rest, element(T, x, i + k), (n - k) * size_of(T));
    const uint64_t word = group(rest, 0) & ((uint64_t(1) << ((n - k) * kBits)) - 1);
    __builtin_memcpy(codes + k / kJoined * kBytes, &word, code_bytes(n - k, kBits));
  }
}

template <int kBits>
void coded_activation_bits(const Elements& e, int f, const Levels& thresholds, uint8_t* codes, int64_t begin,
                           int64_t end) {
  for_tiles(begin, end, [&](int64_t i, int64_t n) {
    with_dtype(e.dtype, [&](auto t) {
      find_codes<decltype(t)::value, kBits>(e.in[0], i, n, thresholds, codes + i * kBits / 8);
    });
    activation(e, f, i, i + n);
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
      Lanes::write<T>(to, i + k * kLanes, Lanes::read<T>(from, i + k * kLanes) * slope[k]);
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
  with_kernel(e.dtype, f, [&](auto t, auto tag) {
    constexpr Dtype T = decltype(t)::value;
    constexpr int kFunction = decltype(tag)::value;
    map_elements<T, 2, 1>({element(T, e.in[0], begin), element(T, e.in[1], begin)}, {element(T, e.out, begin)},
                          end - begin, [&](const F* x, F* y, int64_t i, auto half) {
                            F side = {};
                            if constexpr (has_sides(kFunction)) {
                              const int64_t at = begin + i, left = end - at;
                              uint32_t bits = 0;
                              if (left >= kPair && kPair >= 8)
                                bits = uint32_t(load_codes<kPair >= 8 ? kPair / 8 : 1>(sides + at / 8));
                              else
                                __builtin_memcpy(&bits, sides + at / 8, code_bytes(left < kPair ? left : kPair, 1));
                              side = signs_of_bits<T, decltype(half)::value>(bits >> at % 8);
                            }
                            y[0] = x[0] * slope_of_output<Lanes, kFunction>(x[1], side);
                          });
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
