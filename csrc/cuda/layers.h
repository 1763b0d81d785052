#pragma once
// What the CUDA kernels of layers offer to the registration: torch-free launches on a stream. All return a CUDA error
// code.
#include "body/activation.h"
#include "body/dropout.h"

struct CUstream_st;

namespace pyzo::cuda {

int activation(const Elements&, int function, CUstream_st*);
int activation_backward(const Elements&, int function, CUstream_st*);
int coded_activation(const Elements&, int function, const Levels& thresholds, uint8_t* codes, CUstream_st*);
int coded_activation_backward(const Elements&, const Levels& slopes, const uint8_t* codes, CUstream_st*);
int output_activation_backward(const Elements&, int function, const uint8_t* sides, CUstream_st*);
int dropout(const Elements&, const Dropout&, const int64_t* seed, CUstream_st*);

}  // namespace pyzo::cuda
