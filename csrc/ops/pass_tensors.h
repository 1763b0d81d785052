#pragma once
// The tensors of a pass: checked, and described for the devices without torch.
#include "body/pass.h"
#include "ops/check.h"

namespace pyzo {

// Columns of the table of a pass: one line per tensor, int64, on the CPU.
enum TableColumn : int64_t { kKey, kBase, kInner, kStride, kRow, kTableColumns };

struct PassTensors {
  std::vector<TensorArgs> tensors;   // of a pass over whole tensors
  std::vector<IndexedArgs> indexed;  // of a pass over listed elements; one of the two is empty
  std::vector<Dtype> dtypes;         // of the weights
  Dtype state;                       // of the states
};

struct PassLists {
  const TensorList &src, &dst, &state, &bits, &indices, &low;

  // What sources, states and low bits are as large as, and its name.
  const TensorList& sizes() const { return indices.empty() ? dst : indices; }
  const char* sizes_name() const { return indices.empty() ? "dst" : "indices"; }
};

// The lines of a table of `count` tensors.
inline const int64_t* check_table(const Tensor& table, size_t count) {
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Long && !table.is_cuda() && table.is_contiguous() &&
                      table.dim() == 2 && table.size(0) == int64_t(count) && table.size(1) == kTableColumns,
                  "table: expected a contiguous int64 tensor [", count, ", ", int64_t(kTableColumns), "] on cpu, got ",
                  describe(table));
  return static_cast<const int64_t*>(table.data_ptr());
}

inline void check_row(Name name, int64_t row, int64_t rows) {
  STD_TORCH_CHECK(0 <= row && row < rows, name, ": expected a row of control in [0, ", rows, "), got ", row);
}

// The line of a tensor of n elements.
inline void check_line(Name name, const int64_t* line, int64_t n, int64_t rows) {
  check_shard(name, {line[kBase], line[kInner], line[kStride]}, n);
  STD_TORCH_CHECK(uint64_t(line[kKey]) >> 56 == 0, name, ": expected a key below 2^56, got ", uint64_t(line[kKey]));
  check_row(name, line[kRow], rows);
}

// The packed mask of the n elements of `of`, or, where that is an option, no bytes.
inline void check_bits(const Tensor& bits, Name name, int64_t n, Name of, const Home& control, bool optional) {
  check_same_device(bits, control, name);
  const int64_t bytes = mask_bytes(n);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() &&
                      (bits.numel() == bytes || (optional && bits.numel() == 0)),
                  name, ": expected a contiguous uint8 tensor of ", bytes, " bytes", optional ? " or none" : "",
                  ", a bit for each of the ", n, " elements of ", of, ", got ", describe(bits));
}

// Whether they increase strictly, in [0, size). One pass without branches: the sign of `any` is that of an index or of
// a difference less one.
inline bool is_increasing(const int64_t* indices, int64_t n, int64_t size) {
  uint64_t any = uint64_t(indices[0]);
  for (int64_t i = 1; i < n; ++i) any |= uint64_t(indices[i]) | (uint64_t(indices[i]) - uint64_t(indices[i - 1]) - 1u);
  return int64_t(any) >= 0 && indices[n - 1] < size;
}

// The indices of the elements of `of` that a pass touches. What they are can be read on the CPU only.
inline void check_indices(const Tensor& indices, Name name, const Tensor& of, Name of_name, const Home& control) {
  check_same_device(indices, control, name);
  const int64_t n = indices.numel(), size = of.numel();
  STD_TORCH_CHECK(
      indices.scalar_type() == ScalarType::Long && indices.is_contiguous() && indices.dim() == 1 && n <= size, name,
      ": expected a contiguous int64 vector of at most ", size, " indices of ", of_name, ", got ", describe(indices));
  if (n == 0 || indices.is_cuda()) return;
  const int64_t* values = static_cast<const int64_t*>(indices.data_ptr());
  if (is_increasing(values, n, size)) return;
  for (int64_t i = 0, least = 0; i < n; least = values[i++] + 1)
    STD_TORCH_CHECK(least <= values[i] && values[i] < size, name, ": expected strictly increasing indices in [0, ",
                    size, ") of ", of_name, ", got ", values[i], " at position ", i);
}

// The dtype of the states, of which there are `states` for each tensor of dst.
inline Dtype check_states(const PassLists& lists, int64_t states, const Home& control) {
  const TensorList& state = lists.state;
  STD_TORCH_CHECK(int64_t(state.size()) == states * int64_t(lists.dst.size()), "state: expected ", states,
                  " tensors for each of the ", lists.dst.size(), " of dst, got ", state.size());
  for (size_t i = 0; i < state.size(); ++i) {
    const Tensor& s = state[i];
    const Name name = at("state", i);
    const size_t of = i % lists.dst.size();
    const Tensor& sized = lists.sizes()[of];
    STD_TORCH_CHECK((s.scalar_type() == ScalarType::Float || s.scalar_type() == ScalarType::BFloat16) &&
                        s.scalar_type() == state[0].scalar_type() && s.is_contiguous() && s.numel() == sized.numel(),
                    name, ": expected a contiguous float32 or bfloat16 tensor as all states, of the size of ",
                    at(lists.sizes_name(), of), ", which is ", describe(sized), ", got ", describe(s));
    check_same_device(s, control, name);
  }
  return state.empty() || state[0].scalar_type() == ScalarType::Float ? kFloat32 : kBFloat16;
}

// The low bits of bfloat16 weights, as many as elements of `sized`; of weights of another dtype there are none.
inline void check_low(const Tensor& low, Name name, Dtype dtype, const Tensor& sized, Name sized_name,
                      const Home& control) {
  check_same_device(low, control, name);
  const int64_t n = dtype == kBFloat16 ? sized.numel() : 0;
  STD_TORCH_CHECK(low.scalar_type() == ScalarType::Short && low.is_contiguous() && low.numel() == n, name,
                  ": expected a contiguous int16 tensor of ", n, " elements, one for each of ", sized_name,
                  " where weights are bfloat16, got ", describe(low));
}

inline void check_lengths(const PassLists& lists) {
  const size_t count = lists.dst.size();
  STD_TORCH_CHECK(lists.src.empty() || lists.src.size() == count,
                  "src: expected no tensors (in place) or as many as dst, which has ", count, ", got ",
                  lists.src.size());
  STD_TORCH_CHECK(lists.bits.empty() || lists.bits.size() == count,
                  "bits: expected no tensors or as many as dst, which has ", count, ", got ", lists.bits.size());
  STD_TORCH_CHECK(lists.indices.empty() || lists.indices.size() == count,
                  "indices: expected no tensors or as many as dst, which has ", count, ", got ", lists.indices.size());
  STD_TORCH_CHECK(lists.bits.empty() || lists.indices.empty(),
                  "bits: expected no tensors beside indices, which are a mask already, got ", lists.bits.size());
  STD_TORCH_CHECK(lists.low.empty() || lists.low.size() == count,
                  "low: expected no tensors or as many as dst, which has ", count, ", got ", lists.low.size());
}

inline PassTensors check_tensors(const PassLists& lists, int64_t states, const Tensor& table, const Home& control,
                                 int64_t rows) {
  check_lengths(lists);
  const size_t count = lists.dst.size();
  const int64_t* line = check_table(table, count);
  PassTensors out;
  out.state = check_states(lists, states, control);
  out.dtypes.reserve(count);
  lists.indices.empty() ? out.tensors.reserve(count) : out.indexed.reserve(count);
  for (size_t i = 0; i < count; ++i, line += kTableColumns) {
    const Name name = at("dst", i);
    const Tensor& dst = lists.dst[i];
    const Dtype dtype = check_weights(dst, name);
    const int64_t size = dst.numel();
    check_same_device(dst, control, name);
    if (!lists.indices.empty()) check_indices(lists.indices[i], at("indices", i), dst, name, control);
    const Tensor& sized = lists.sizes()[i];
    const int64_t n = lists.indices.empty() ? size : sized.numel();
    if (!lists.src.empty()) {
      const Tensor& src = lists.src[i];
      check_same_device(src, control, at("src", i));
      STD_TORCH_CHECK(check_weights(src, at("src", i)) == dtype && src.numel() == n, at("src", i),
                      ": expected the dtype of ", name, ", which is ", describe(dst), ", and the size of ",
                      at(lists.sizes_name(), i), ", which is ", describe(sized), ", got ", describe(src));
    }
    check_line(name, line, size, rows);
    if (!lists.bits.empty()) check_bits(lists.bits[i], at("bits", i), size, name, control, true);
    if (!lists.low.empty()) check_low(lists.low[i], at("low", i), dtype, sized, at(lists.sizes_name(), i), control);
    if (n == 0) continue;
    TensorArgs t = {nullptr,    dst.data_ptr(), {}, n, uint64_t(line[kKey]), {line[kBase], line[kInner], line[kStride]},
                    line[kRow], nullptr};
    if (!lists.src.empty())
      t.src = lists.src[i].data_ptr();
    else if (lists.indices.empty())
      t.src = t.dst;
    for (int64_t k = 0; k < states; ++k) t.state[k] = lists.state[size_t(k) * count + i].data_ptr();
    if (!lists.bits.empty() && lists.bits[i].numel() > 0)
      t.bits = static_cast<const uint8_t*>(lists.bits[i].data_ptr());
    if (!lists.low.empty() && lists.low[i].numel() > 0) t.low = static_cast<uint16_t*>(lists.low[i].data_ptr());
    if (lists.indices.empty())
      out.tensors.push_back(t);
    else
      out.indexed.push_back({t, static_cast<const int64_t*>(sized.data_ptr()), size});
    out.dtypes.push_back(dtype);
  }
  check_overlap(
      {{"dst", lists.dst}, {"state", lists.state}, {"low", lists.low}},
      {{"src", lists.src, lists.indices.empty() ? "dst" : nullptr}, {"bits", lists.bits}, {"indices", lists.indices}});
  return out;
}

}  // namespace pyzo
