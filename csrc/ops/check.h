#pragma once
// Checks of operator arguments, written once for both devices. Every message names the argument, what was expected and
// what came.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "core/control.h"
#include "core/rounding.h"

namespace pyzo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

inline std::string describe(const Tensor& t) {
  std::ostringstream s;
  s << torch::headeronly::toString(t.scalar_type()) << '[';
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "] on " << (t.is_cuda() ? "cuda" : "cpu");
  if (t.is_cuda()) s << ':' << t.get_device_index();
  if (!t.is_contiguous()) s << ", not contiguous";
  return s.str();
}

// What a message calls an argument: "x", or an element of a list, "dst[3]". Text is made where one is written only, for
// passes go over hundreds of tensors.
struct Name {
  const char* list;
  int64_t index = -1;
  Name(const char* argument) : list(argument) {}
  Name(const char* argument, size_t i) : list(argument), index(int64_t(i)) {}
};
inline std::ostream& operator<<(std::ostream& s, Name name) {
  s << name.list;
  return name.index < 0 ? s : s << '[' << name.index << ']';
}
inline Name at(const char* list, size_t i) { return {list, i}; }

inline std::optional<Dtype> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      return std::nullopt;
  }
}

inline Dtype check_weights(const Tensor& t, Name name) {
  const std::optional<Dtype> dtype = dtype_of(t.scalar_type());
  STD_TORCH_CHECK(dtype && *dtype != kFloat64 && t.is_contiguous(), name,
                  ": expected a contiguous float32, bfloat16 or float16 tensor, got ", describe(t));
  return *dtype;
}

// The device of a tensor, asked once.
struct Home {
  const Tensor& tensor;
  bool cuda;
  int32_t index;
  Home(const Tensor& t) : tensor(t), cuda(t.is_cuda()), index(cuda ? t.get_device_index() : -1) {}
  bool has(const Tensor& t) const { return t.is_cuda() == cuda && (!cuda || t.get_device_index() == index); }
};

inline bool same_device(const Tensor& a, const Tensor& b) { return Home(b).has(a); }

inline void check_same_device(const Tensor& t, const Home& control, Name name) {
  STD_TORCH_CHECK(control.has(t), name, ": expected a tensor on the device of control, which is ",
                  describe(control.tensor), ", got ", describe(t));
}

inline Control check_control(const Tensor& t) {
  const bool ok = t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.dim() == 2 &&
                  t.size(0) > Control::kLines && t.size(1) > Control::kHeader && t.size(1) % 2 == 0;
  STD_TORCH_CHECK(ok, "control: expected a contiguous int64 matrix [3 + rows, 16 + 2 * directions], got ", describe(t));
  return {static_cast<int64_t*>(t.data_ptr()), (t.size(1) - Control::kHeader) / 2, t.size(0) - Control::kLines};
}

inline void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  STD_TORCH_CHECK(low <= value && value < high, name, ": expected an integer in [", low, ", ", high, "), got ", value);
}

// A rectangle of n elements whose global indices lie in [0, 2^63).
inline void check_shard(Name name, const Shard& s, int64_t n) {
  bool ok = s.base >= 0;
  int64_t last = s.base;
  if (ok && n > 0) {
    if (s.inner <= 0) {
      ok = !__builtin_add_overflow(s.base, n - 1, &last);
    } else {
      int64_t rows;
      ok = s.stride >= s.inner && !__builtin_mul_overflow((n - 1) / s.inner, s.stride, &rows) &&
           !__builtin_add_overflow(s.base, rows, &last) && !__builtin_add_overflow(last, s.inner - 1, &last);
    }
  }
  STD_TORCH_CHECK(ok, name, ": expected a shard with base >= 0, stride >= inner and indices below 2^63, got base ",
                  s.base, ", inner ", s.inner, ", stride ", s.stride, " for ", n, " elements");
}

struct NamedList {
  const char* name;
  const TensorList& tensors;
  const char* own = nullptr;  // a list whose tensor of the same place may be the same memory
};

// The memory of one tensor of a list.
struct Span {
  uintptr_t begin, end;
  const char *list, *own;
  size_t index;
  bool operator<(const Span& o) const { return begin < o.begin; }
  Name name() const { return at(list, index); }
};

inline std::vector<Span> spans(std::initializer_list<NamedList> lists) {
  std::vector<Span> out;
  size_t count = 0;
  for (const NamedList& list : lists) count += list.tensors.size();
  out.reserve(count);
  for (const NamedList& list : lists)
    for (size_t i = 0; i < list.tensors.size(); ++i) {
      const Tensor& t = list.tensors[i];
      const int64_t n = t.numel();
      if (n == 0) continue;
      const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data_ptr());
      out.push_back({begin, begin + uintptr_t(n) * t.element_size(), list.name, list.own, i});
    }
  std::sort(out.begin(), out.end());
  return out;
}

// No two tensors that are written share memory, and what is read shares none with them, but a tensor with all of its
// own.
inline void check_overlap(std::initializer_list<NamedList> written, std::initializer_list<NamedList> read) {
  const std::vector<Span> to = spans(written);
  for (size_t k = 1; k < to.size(); ++k)
    STD_TORCH_CHECK(to[k - 1].end <= to[k].begin, to[k].name(),
                    ": expected memory of its own, got a tensor that overlaps ", to[k - 1].name());
  for (const Span& from : spans(read)) {
    auto hit = std::upper_bound(to.begin(), to.end(), from);
    if (hit != to.begin() && (hit - 1)->end > from.begin) --hit;
    for (; hit != to.end() && hit->begin < from.end; ++hit)
      STD_TORCH_CHECK(
          from.own && hit->list == std::string(from.own) && hit->index == from.index && hit->begin == from.begin,
          from.name(), ": expected memory apart from what is written",
          from.own ? " or that of its own destination" : "", ", got a tensor that overlaps ", hit->name());
  }
}

}  // namespace pyzo
