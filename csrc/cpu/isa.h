#pragma once
// The bodies of one instruction set as a table of functions. No torch: raw pointers, the caller supplies the threads.
#include "body/pass.h"

namespace pyzo::cpu {

// Elements are handled in tiles: a tile of a run starts at a multiple of the tile size in the tensor's global index.
constexpr int64_t kTile = 1024;

struct Isa {
  const char* name;
  bool (*supported)();
  // Elements [begin, end) of one tensor (local indices), whose weights and states have these dtypes.
  void (*pass)(const PassArgs&, const TensorArgs&, Dtype, Dtype state, int64_t begin, int64_t end);
  // Elements [begin, end) of a list.
  void (*pass_indexed)(const PassArgs&, const IndexedArgs&, Dtype, Dtype state, int64_t begin, int64_t end);
  // Elements [begin, end) of looked-up rows, by a rule without state.
  void (*pass_rows)(const PassArgs&, const RowsArgs&, Dtype, int64_t begin, int64_t end);
  // The packed mask of elements [begin, end), begin a multiple of 8 and of the lanes: whose magnitude is at most
  // `most`.
  void (*mask_bits)(const void* weights, Dtype, int32_t most, uint8_t* packed, int64_t begin, int64_t end);
  void (*noise)(Source, Shard, int distribution, Dtype, void* out, int64_t begin, int64_t end);
};

extern const Isa isa_base, isa_avx2, isa_avx512;

// The instruction set in use: the best one supported, unless a test selected another. Results never depend on it.
const Isa& isa();
// Returns false where the machine lacks it. An empty name selects the best one.
bool select_isa(const char* name);
const Isa* const* all_isas(int& count);

}  // namespace pyzo::cpu
