#pragma once
// What the CUDA kernels offer to the registration: torch-free launches on a stream. All return a CUDA error code.
#include <cstddef>

#include "body/pass.h"

struct CUstream_st;

namespace pyzo::cuda {

int pass(const PassArgs&, const TensorArgs* tensors, size_t count, Dtype, Dtype state, CUstream_st*);
int pass_indexed(const PassArgs&, const IndexedArgs* tensors, size_t count, Dtype, Dtype state, CUstream_st*);
int pass_rows(const PassArgs&, const RowsArgs* tensors, size_t count, Dtype, CUstream_st*);
int mask_bits(Control, const TensorArgs* tensors, size_t count, Dtype, CUstream_st*);  // from src to dst
int noise(Source, Shard, int distribution, Dtype, void* out, int64_t n, CUstream_st*);
int philox(uint32_t* out, int64_t n, uint64_t seed, uint64_t high, uint64_t block, CUstream_st*);
int begin_step(Control, CUstream_st*);
int estimate(Control, const double* losses, int64_t count, int kind, int64_t q, int scaling, CUstream_st*);
int choose(Control, const double* losses, CUstream_st*);
const char* error_text(int error);

}  // namespace pyzo::cuda
