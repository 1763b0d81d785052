// Kernels of norms. Included once by each cpu/layers_*.cpp; lies in that file's own namespace.
// A row is read as often as its sums need it, which its first reading leaves in the cache. Sums over a row are
// kNormSums partial sums, element j in partial sum j mod kNormSums, halved until one is left: the same bits whatever
// the lanes.
#include <cmath>
#include <type_traits>
#include <utility>

#include "body/norm.h"

namespace pyzo::cpu::PYZO_ISA {

// kNormSums neighbouring elements.
struct Chunk {
  F v[kNormSums / kLanes];
};

// Calls run(k) for each vector of a chunk, k a constant, so that chunks live in registers.
template <class Run, int... k>
PYZO_HD void each_of(const Run& run, std::integer_sequence<int, k...>) {
  (run(std::integral_constant<int, k>{}), ...);
}
template <class Run>
PYZO_HD void each_vector(const Run& run) {
  each_of(run, std::make_integer_sequence<int, kNormSums / kLanes>{});
}

template <class L = Lanes>
PYZO_HD typename L::F spread(Number x) {
  if constexpr (L::kWidth == 1)
    return x;
  else
    return L::splat(x);
}

// Calls run(first element, number, whole) for each chunk of a row; whole is std::true_type for all but a shorter last.
template <class Run>
PYZO_HD void for_chunks(int64_t columns, const Run& run) {
  int64_t j = 0;
  for (; j + kNormSums <= columns; j += kNormSums) run(j, kNormSums, std::true_type{});
  if (j < columns) run(j, columns - j, std::false_type{});
}

// Elements [i, i + n); the rest of the chunk is `pad`.
template <Dtype T, bool kWhole>
PYZO_HD Chunk load_chunk(const void* from, int64_t i, int64_t n, Number pad = 0) {
  Chunk c;
  if constexpr (kWhole) {
    each_vector([&](auto k) { c.v[k] = Lanes::read<T>(from, i + k * kLanes); });
  } else {
    alignas(64) char buffer[8 * kNormSums] = {};
    __builtin_memcpy(buffer, static_cast<const char*>(from) + i * size_of(T), n * size_of(T));
    alignas(64) Number number[kNormSums];
    each_vector([&](auto k) { c.v[k] = Lanes::read<T>(buffer, k * kLanes); });
    __builtin_memcpy(number, &c, sizeof c);
    for (int64_t k = n; k < kNormSums; ++k) number[k] = pad;
    __builtin_memcpy(&c, number, sizeof c);
  }
  return c;
}

// Elements [i, i + kNormSums) are fetched meanwhile; they may lie beyond the tensor.
template <Dtype T>
PYZO_HD void prefetch_chunk(const void* from, int64_t i) {
  const char* at = static_cast<const char*>(from) + i * size_of(T);
  for (int64_t line = 0; line < kNormSums * size_of(T); line += 64) __builtin_prefetch(at + line);
}

template <Dtype T, bool kWhole>
PYZO_HD void store_chunk(void* to, int64_t i, int64_t n, const Chunk& c) {
  if constexpr (kWhole) {
    each_vector([&](auto k) { Lanes::write<T>(to, i + k * kLanes, c.v[k]); });
  } else {
    alignas(64) char buffer[8 * kNormSums];
    each_vector([&](auto k) { Lanes::write<T>(buffer, k * kLanes, c.v[k]); });
    __builtin_memcpy(static_cast<char*>(to) + i * size_of(T), buffer, n * size_of(T));
  }
}

// Tables and partial sums are whole chunks.
PYZO_HD Chunk load_numbers(const Number* from) {
  Chunk c;
  each_vector([&](auto k) { c.v[k] = Lanes::load<kNumber>(from, k * kLanes); });
  return c;
}
PYZO_HD void add_numbers(Number* to, const Chunk& c) {
  each_vector([&](auto k) { Lanes::store<kNumber>(to, k * kLanes, Lanes::load<kNumber>(to, k * kLanes) + c.v[k]); });
}

// The upper half of n vectors added to the lower half, until one is left.
template <int n>
PYZO_HD void halve(Chunk& c) {
  if constexpr (n > 1) {
    each_of([&](auto k) { c.v[k] += c.v[k + n / 2]; }, std::make_integer_sequence<int, n / 2>{});
    halve<n / 2>(c);
  }
}

// The same for the lanes of a vector.
PYZO_HD Number fold(F v) {
#if PYZO_LANES >= 8
#if PYZO_LANES == 16
  const __m512 both = (__m512)v;
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  alignas(64) Number s[kLanes];
  __builtin_memcpy(s, &v, sizeof s);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) s[i] += s[i + half];
  return s[0];
#endif
}

PYZO_HD Number total(Chunk c) {
  halve<kNormSums / kLanes>(c);
  return fold(c.v[0]);
}

struct Moments {
  Number mean, rstd;
};

inline Number reciprocal_root(Number variance, double eps) { return Number(1) / std::sqrt(variance + Number(eps)); }

// Of the row that begins at element i, the mean alone where no more is asked for. The variance is taken from centred
// values, and both it and the mean are mended by what the sum of these shows the mean to be off.
template <Dtype T, bool kVariance = true>
Moments moments(const void* x, int64_t i, const NormArgs& a) {
  const Number n = Number(a.columns);
  if (!a.centered) {
    Chunk squares = {};
    for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
      const Chunk c = load_chunk<T, decltype(whole)::value>(x, i + j, m);
      each_vector([&](auto k) { squares.v[k] += c.v[k] * c.v[k]; });
    });
    return {0, reciprocal_root(total(squares) / n, a.eps)};
  }
  Chunk sum = {}, rest = {}, squares = {};
  for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
    const Chunk c = load_chunk<T, decltype(whole)::value>(x, i + j, m);
    each_vector([&](auto k) { sum.v[k] += c.v[k]; });
  });
  const Number mean = total(sum) / n;
  const F center = spread(mean);
  for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
    const Chunk c = load_chunk<T, decltype(whole)::value>(x, i + j, m, mean);
    prefetch_chunk<T>(x, i + a.columns + j);  // of the next row
    each_vector([&](auto k) {
      const F d = c.v[k] - center;
      rest.v[k] += d;
      if constexpr (kVariance) squares.v[k] += d * d;
    });
  });
  const Number shift = total(rest) / n;
  if constexpr (!kVariance) return {mean + shift, 0};
  const Number variance = total(squares) / n - shift * shift;
  return {mean + shift, reciprocal_root(variance < 0 ? Number(0) : variance, a.eps)};
}

// gamma, beta and 1 / gamma as numbers, each padded to whole chunks.
struct Tables {
  const Number *gamma, *beta, *inverse;
};

inline Tables tables_at(const void* at, const NormArgs& a) {
  const Number* p = static_cast<const Number*>(at);
  const int64_t stride = norm_stride(a.columns);
  return {p, p + stride, p + 2 * stride};
}

inline void norm_tables(const NormArgs& a, void* at) {
  const int64_t stride = norm_stride(a.columns);
  Number *gamma = static_cast<Number*>(at), *beta = gamma + stride, *inverse = beta + stride;
  const auto read = [&](const void* from, Dtype dtype, Number* to) {
    with_dtype(dtype, [&](auto t) {
      for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
        const Chunk c = load_chunk<decltype(t)::value, decltype(whole)::value>(from, j, m);
        __builtin_memcpy(to + j, &c, sizeof c);
      });
    });
  };
  if (a.weight) read(a.weight, a.weight_dtype, gamma);
  if (a.bias) read(a.bias, a.bias_dtype, beta);
  for (int64_t j = 0; j < stride; ++j) {
    const bool inside = j < a.columns;
    gamma[j] = a.weight && inside ? Number(a.offset) + gamma[j] : Number(1);
    beta[j] = a.bias && inside ? beta[j] : Number(0);
    inverse[j] = Number(1) / gamma[j];
  }
}

template <Dtype X, Dtype Y, bool kAffine>
void normalize_rows(const NormArgs& a, const NormForward& f, const void* at, int64_t begin, int64_t end) {
  const Tables tables = tables_at(at, a);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = r * a.columns;
    const Moments row = moments<X>(f.x, i, a);
    static_cast<Number*>(f.rstd)[r] = row.rstd;
    const F mean = spread(row.mean), rstd = spread(row.rstd);
    for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
      Chunk c = load_chunk<X, decltype(whole)::value>(f.x, i + j, m);
      Chunk gamma, beta;
      if constexpr (kAffine) gamma = load_numbers(tables.gamma + j), beta = load_numbers(tables.beta + j);
      each_vector([&](auto k) {
        c.v[k] = normalized<Lanes>(c.v[k], mean, rstd);
        if constexpr (kAffine) c.v[k] = c.v[k] * gamma.v[k] + beta.v[k];
      });
      store_chunk<Y, decltype(whole)::value>(f.y, i + j, m, c);
    });
  }
}

// What a chunk of a row contributes: g, and the normalised values.
template <Dtype X, Dtype Y, bool kFromInput, bool kAffine>
struct RowGradient {
  const NormBackward& b;
  const Tables tables;
  int64_t i;
  Number center;  // of the input
  F mean, rstd;

  template <bool kWhole>
  PYZO_HD void read(int64_t j, int64_t m, Chunk& gradient, Chunk& g, Chunk& value) const {
    gradient = load_chunk<Y, kWhole>(b.gradient, i + j, m);
    g = gradient;
    if constexpr (kFromInput)
      value = load_chunk<X, kWhole>(b.saved, i + j, m, center);
    else
      value = load_chunk<Y, kWhole>(b.saved, i + j, m);
    Chunk gamma, beta, inverse;
    if constexpr (kAffine) gamma = load_numbers(tables.gamma + j);
    if constexpr (kAffine && !kFromInput)
      beta = load_numbers(tables.beta + j), inverse = load_numbers(tables.inverse + j);
    each_vector([&](auto k) {
      if constexpr (kFromInput)
        value.v[k] = normalized<Lanes>(value.v[k], mean, rstd);
      else if constexpr (kAffine)
        value.v[k] = recovered<Lanes>(value.v[k], beta.v[k], inverse.v[k]);
      if constexpr (kAffine) g.v[k] = g.v[k] * gamma.v[k];
    });
  }
};

// dweight, dbias: sums over these rows, added to what is there; null where not wanted.
template <Dtype X, Dtype Y, bool kFromInput, bool kAffine>
void gradient_rows(const NormArgs& a, const NormBackward& b, const void* at, Number* dweight, Number* dbias,
                   int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Number scale = static_cast<const Number*>(b.rstd)[r];
    Number center = 0;
    if constexpr (kFromInput)
      if (a.centered) center = moments<X, false>(b.saved, r * a.columns, a).mean;
    const RowGradient<X, Y, kFromInput, kAffine> row = {b,      tables_at(at, a), r * a.columns,
                                                        center, spread(center),   spread(scale)};
    Chunk sum = {}, sum_x = {};
    for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
      Chunk gradient, g, value;
      row.template read<decltype(whole)::value>(j, m, gradient, g, value);
      Chunk product;
      each_vector([&](auto k) {
        sum.v[k] += g.v[k];
        sum_x.v[k] += g.v[k] * value.v[k];
        product.v[k] = gradient.v[k] * value.v[k];
      });
      if (kAffine && dweight) add_numbers(dweight + j, product);
      if (kAffine && dbias) add_numbers(dbias + j, gradient);
    });
    const Number n = Number(a.columns);
    const F mean_g = spread(a.centered ? total(sum) / n : Number(0)), mean_gx = spread(total(sum_x) / n);
    for_chunks(a.columns, [&](int64_t j, int64_t m, auto whole) {
      Chunk gradient, g, value;
      row.template read<decltype(whole)::value>(j, m, gradient, g, value);
      prefetch_chunk<Y>(b.gradient, row.i + a.columns + j);  // of the next row
      prefetch_chunk<kFromInput ? X : Y>(b.saved, row.i + a.columns + j);
      each_vector([&](auto k) { g.v[k] = input_gradient<Lanes>(g.v[k], value.v[k], mean_g, mean_gx, row.rstd); });
      store_chunk<X, decltype(whole)::value>(b.dx, row.i + j, m, g);
    });
  }
}

template <class Run>
PYZO_HD void with_dtypes(const NormArgs& a, const Run& run) {
  with_dtype(a.input, [&](auto x) { with_dtype(a.output, [&](auto y) { run(x, y); }); });
}

inline void norm(const NormArgs& a, const NormForward& f, const void* tables, int64_t begin, int64_t end) {
  with_dtypes(a, [&](auto x, auto y) {
    constexpr Dtype X = decltype(x)::value, Y = decltype(y)::value;
    const auto run = a.weight || a.bias ? normalize_rows<X, Y, true> : normalize_rows<X, Y, false>;
    run(a, f, tables, begin, end);
  });
}

inline void norm_backward(const NormArgs& a, const NormBackward& b, const void* tables, void* dweight, void* dbias,
                          int64_t begin, int64_t end) {
  with_dtypes(a, [&](auto x, auto y) {
    constexpr Dtype X = decltype(x)::value, Y = decltype(y)::value;
    const auto from_input = a.weight || a.bias ? gradient_rows<X, Y, true, true> : gradient_rows<X, Y, true, false>;
    const auto from_output = a.weight || a.bias ? gradient_rows<X, Y, false, true> : gradient_rows<X, Y, false, false>;
    const auto run = b.from_input ? from_input : from_output;
    run(a, b, tables, static_cast<Number*>(dweight), static_cast<Number*>(dbias), begin, end);
  });
}

// out[j] = the sum over blocks, in their order, of partial[block * stride + j].
inline void norm_sum(const void* partial, int64_t blocks, int64_t stride, Dtype dtype, void* out, int64_t columns) {
  with_dtype(dtype, [&](auto t) {
    for_chunks(columns, [&](int64_t j, int64_t m, auto whole) {
      Chunk sum = {};
      for (int64_t block = 0; block < blocks; ++block) {
        const Chunk c = load_numbers(static_cast<const Number*>(partial) + block * stride + j);
        each_vector([&](auto k) { sum.v[k] += c.v[k]; });
      }
      store_chunk<decltype(t)::value, decltype(whole)::value>(out, j, m, sum);
    });
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
