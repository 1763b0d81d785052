#pragma once
// The pass over looked-up rows: its tensors checked and described without torch. A Device has a static function
// pass_rows that takes them and the tensor whose device (and stream) is meant.
#include "ops/pass_tensors.h"

namespace pyzo {

struct LookedUp {
  std::vector<RowsArgs> rows;
  std::vector<Dtype> dtypes;
};

// Which rows of a matrix of `size` rows those of `out` are. What they are can be read on the CPU only.
inline void check_ids(const Tensor& ids, Name name, const Tensor& out, Name out_name, int64_t size,
                      const Home& control) {
  check_same_device(ids, control, name);
  STD_TORCH_CHECK(
      ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && ids.dim() == 1 && ids.numel() == out.size(0),
      name, ": expected a contiguous int64 vector, an id for each row of ", out_name, ", which is ", describe(out),
      ", got ", describe(ids));
  if (ids.numel() == 0 || ids.is_cuda()) return;
  const int64_t* values = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(0 <= values[i] && values[i] < size, name, ": expected rows in [0, ", size, "), got ", values[i],
                    " at position ", i);
}

inline LookedUp check_looked_up(const TensorList& out, const TensorList& ids, const TensorList& bits,
                                const std::vector<int64_t>& sizes, const Tensor& table, const Home& control,
                                int64_t rows) {
  const size_t count = out.size();
  STD_TORCH_CHECK(ids.size() == count, "ids: expected as many tensors as out, which has ", count, ", got ", ids.size());
  STD_TORCH_CHECK(bits.empty() || bits.size() == count, "bits: expected no tensors or as many as out, which has ",
                  count, ", got ", bits.size());
  STD_TORCH_CHECK(sizes.size() == count, "sizes: expected as many numbers as out has tensors, ", count, ", got ",
                  sizes.size());
  const int64_t* line = check_table(table, count);
  LookedUp work;
  for (size_t i = 0; i < count; ++i, line += kTableColumns) {
    const Name name = at("out", i);
    const Dtype dtype = check_weights(out[i], name);
    STD_TORCH_CHECK(out[i].dim() == 2, name, ": expected a matrix, got ", describe(out[i]));
    check_same_device(out[i], control, name);
    const int64_t width = out[i].size(1);
    int64_t n;
    STD_TORCH_CHECK(sizes[i] >= 0 && !__builtin_mul_overflow(sizes[i], width, &n), at("sizes", i),
                    ": expected a number of rows of ", width, " elements each, fewer than 2^63 in all, got ", sizes[i]);
    check_ids(ids[i], at("ids", i), out[i], name, sizes[i], control);
    check_line(name, line, n, rows);
    if (!bits.empty()) check_bits(bits[i], at("bits", i), n, at("the matrix of out", i), control, true);
    if (out[i].numel() == 0) continue;
    void* const data = out[i].data_ptr();
    const uint8_t* const packed =
        bits.empty() || bits[i].numel() == 0 ? nullptr : static_cast<const uint8_t*>(bits[i].data_ptr());
    work.rows.push_back({{data,
                          data,
                          {},
                          out[i].numel(),
                          uint64_t(line[kKey]),
                          {line[kBase], line[kInner], line[kStride]},
                          line[kRow],
                          packed},
                         static_cast<const int64_t*>(ids[i].data_ptr()),
                         sizes[i],
                         width});
    work.dtypes.push_back(dtype);
  }
  check_overlap({{"out", out}}, {{"ids", ids}, {"bits", bits}});
  return work;
}

template <class Device>
void pass_rows_(const TensorList& out, const TensorList& ids, const TensorList& bits, const std::vector<int64_t>& sizes,
                Tensor table, Tensor control, int64_t distribution, int64_t rule, int64_t directions,
                double update_sign, bool chosen, int64_t perturb, double perturb_sign, bool stochastic, bool masked) {
  const Control c = check_control(control);
  check_range("distribution", distribution, 0, 2);
  check_range("rule", rule, 0, kRules);
  check_range("directions", directions, 0, c.directions + 1);
  check_range("perturb", perturb, -1, c.directions);
  STD_TORCH_CHECK(directions == 0 || states_of(int(rule)) == 0,
                  "rule: expected one without state for an update of looked-up rows, got ", rule);
  const LookedUp work = check_looked_up(out, ids, bits, sizes, table, control, c.rows);
  if ((directions == 0 && perturb < 0) || work.rows.empty()) return;
  PassArgs args = {};
  args.control = c, args.distribution = int(distribution), args.undo = -1;
  args.rule = int(rule), args.directions = int(directions), args.update_sign = float(update_sign);
  args.chosen = chosen, args.perturb = int(perturb), args.perturb_sign = float(perturb_sign);
  args.stochastic = stochastic, args.masked = masked;
  Device::pass_rows(control, args, work);
}

}  // namespace pyzo
