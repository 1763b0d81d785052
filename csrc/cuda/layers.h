#pragma once
// What the CUDA kernels of layers offer to the registration: torch-free launches on a stream. All return a CUDA error
// code.
#include "body/dropout.h"
#include "body/gate.h"
#include "body/norm.h"

struct CUstream_st;

namespace pyzo::cuda {

int activation(const Elements&, int function, CUstream_st*);
int activation_backward(const Elements&, int function, CUstream_st*);
int coded_activation(const Elements&, int function, const Levels& thresholds, uint8_t* codes, CUstream_st*);
int coded_activation_backward(const Elements&, const Levels& slopes, const uint8_t* codes, CUstream_st*);
int output_activation_backward(const Elements&, int function, const uint8_t* sides, CUstream_st*);
int dropout(const Elements&, const Dropout&, const int64_t* seed, CUstream_st*);
int gate(const GateArgs&, int function, CUstream_st*);
int gate_backward(const GateArgs&, int function, CUstream_st*);

// Blocks of rows that sums over rows are taken in; norm_backward is given 2 * columns numbers for each, or null where
// no gradient of a parameter is wanted.
int64_t norm_blocks(int64_t rows);
int norm(const NormArgs&, const NormForward&, CUstream_st*);
int norm_backward(const NormArgs&, const NormBackward&, float* sums, CUstream_st*);

}  // namespace pyzo::cuda
