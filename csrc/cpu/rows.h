// The pass of one instruction set over looked-up rows: each is a run (or, in a shard, runs) of the matrix that lies
// elsewhere. Included once by each cpu/isa_*.cpp after its tiles (cpu/tile.h); lies in that file's own namespace.

namespace pyzo::cpu::PYZO_ISA {

template <Dtype T, int kRule>
void pass_looked_up(const PassArgs& a, const RowsArgs& t, int64_t begin, int64_t end) {
  const TensorPass<kRule> pass = pass_over<T, kFloat32, kRule>(a, t, mask_of(a, t));
  TileNoise noise;
  int64_t row = begin / t.width, column = begin % t.width;
  while (begin < end) {
    const int64_t left = t.width - column, n = left < end - begin ? left : end - begin;
    const int64_t first = t.ids[row] * t.width + column, shift = begin - first;
    for_runs(t.shard, first, first + n, [&](int64_t local, uint64_t global, int64_t count) {
      pass_run<T, kFloat32>(pass, noise, local, global, count, local + shift);
    });
    begin += n, ++row, column = 0;
  }
}

void pass_rows(const PassArgs& a, const RowsArgs& t, Dtype dtype, int64_t begin, int64_t end) {
  with_types(a, dtype, kFloat32, [&](auto weight, auto, auto rule) {
    if constexpr (RuleOf<Lanes, rule.value>::type::kStates == 0)
      pass_looked_up<weight.value, rule.value>(a, t, begin, end);
  });
}

}  // namespace pyzo::cpu::PYZO_ISA
