// The parts of the normal transform as kernels of their own, for counting their instructions; bench/cases/normal.py
// reads them.
#include "core/normal.h"

using namespace pyzo;

extern "C" __global__ void word_to_radius(const uint32_t* in, float* out) {
  out[threadIdx.x] = radius<Scalar>(in[threadIdx.x]);
}

extern "C" __global__ void square_root(const float* in, float* out) {
  out[threadIdx.x] = Scalar::sqrt(in[threadIdx.x]);
}

extern "C" __global__ void sine_and_cosine(const uint32_t* in, float* out) {
  float c, s;
  direction_of<Scalar>(in[threadIdx.x], c, s);
  out[threadIdx.x] = c;
  out[threadIdx.x + 32] = s;
}
