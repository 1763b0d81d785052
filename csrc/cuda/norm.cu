// Norms on CUDA. Rows of up to 4,096 or 8,192 elements stay in registers between their sums and the result, so each is
// read once; longer ones are read again, from the L2 cache. No torch.
#include <algorithm>
#include <initializer_list>

#include "cuda/norm.cuh"

namespace pyzo::cuda {
namespace {

constexpr int kBlockThreads = 256;   // of the groups of a block together, where one row needs fewer
constexpr int kLongThreads = 512;    // of rows that are not held
constexpr int64_t kSumBlocks = 264;  // of rows, where sums over rows are wanted: two for each of 132 processors
constexpr int64_t kSumRows = 8;      // of a block, at least
constexpr int kSumColumns = 32, kSumSlices = 8;

__device__ __forceinline__ float reciprocal_root(float variance, float eps) {
  return __frcp_rn(__fsqrt_rn(variance + eps));
}

struct Moments {
  float mean, rstd;
};

// From sums that a row visits: visit(run) calls run(x) for each of this thread's elements of the row.
template <class Visit>
__device__ __forceinline__ Moments moments(const Group& g, const NormArgs& a, GroupSum<2>& sum, const Visit& visit) {
  const float share = __frcp_rn(float(a.columns));
  float s[2] = {};
  if (!a.centered) {
    visit([&](float x) { s[0] += x * x; });
    sum(g, s);
    return {0.0f, reciprocal_root(s[0] * share, float(a.eps))};
  }
  visit([&](float x) { s[0] += x; });
  sum(g, s);
  const float mean = s[0] * share;
  s[0] = s[1] = 0.0f;
  visit([&](float x) {
    const float d = x - mean;
    s[0] += d;
    s[1] += d * d;
  });
  sum(g, s);
  // Both are mended by what the sum of centred values shows the mean to be off.
  const float shift = s[0] * share, variance = s[1] * share - shift * shift;
  return {mean + shift, reciprocal_root(variance < 0.0f ? 0.0f : variance, float(a.eps))};
}

// Whether element k of vector v belongs to the row.
template <bool kWide>
__device__ __forceinline__ bool inside(const Group& g, int v, int k, int columns) {
  return g.at<kWide>(v, kWide ? 0 : k) < columns;
}

// The moments of a row that is read as often as it takes, one vector at a time.
template <bool kWide>
__device__ __forceinline__ Moments long_moments(const Group& g, const NormArgs& a, GroupSum<2>& sum, const void* x,
                                                int64_t row, int vectors) {
  return moments(g, a, sum, [&](auto&& run) {
    for (int v = 0; v < vectors; ++v) {
      float c[1][kEach];
      load_row<1, kWide>(g, a.input, x, row, a.columns, v, 0.0f, c);
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        if (inside<kWide>(g, v, k, a.columns)) run(c[0][k]);
    }
  });
}

template <bool kWide>
__device__ __forceinline__ void write_vector(const Group& g, const NormArgs& a, const NormForward& f, int64_t row,
                                             int v, Moments m, float (&x)[1][kEach]) {
#pragma unroll
  for (int k = 0; k < kEach; ++k) x[0][k] = normalized<Lane>(x[0][k], m.mean, m.rstd);
  if (a.weight || a.bias) {
    float gamma[1][kEach], beta[1][kEach];
    load_gamma<1, kWide>(g, a, v, gamma);
    load_beta<1, kWide>(g, a, v, beta);
#pragma unroll
    for (int k = 0; k < kEach; ++k) x[0][k] = x[0][k] * gamma[0][k] + beta[0][k];
  }
  store_row<1, kWide>(g, a.output, f.y, row, a.columns, v, x);
}

// kThreads: of a group, at most; with half of what a block can have, three blocks fit into a processor's registers.
template <bool kWide, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 512 ? 3 : 1) norm_kernel(NormArgs a, NormForward f) {
  __shared__ float part[2][kMostWarps][2];
  GroupSum<2> sum = {part};
  const Group g;
  const int64_t r = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, row = r * a.columns;
  const int columns = r < a.rows ? int(a.columns) : 0;  // the last groups may have nothing to do, but sum in step
  float x[1][kEach];
  load_row<1, kWide>(g, a.input, f.x, row, columns, 0, 0.0f, x);
  const Moments m = moments(g, a, sum, [&](auto&& run) {
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (inside<kWide>(g, 0, k, columns)) run(x[0][k]);
  });
  if (r >= a.rows) return;
  if (g.thread == 0) static_cast<float*>(f.rstd)[r] = m.rstd;
  write_vector<kWide>(g, a, f, row, 0, m, x);
}

template <bool kWide>
__global__ void __launch_bounds__(kLongThreads) long_norm_kernel(NormArgs a, NormForward f, int vectors) {
  __shared__ float part[2][kMostWarps][2];
  GroupSum<2> sum = {part};
  const Group g;
  const int64_t row = int64_t(blockIdx.x) * a.columns;
  const Moments m = long_moments<kWide>(g, a, sum, f.x, row, vectors);
  if (g.thread == 0) static_cast<float*>(f.rstd)[blockIdx.x] = m.rstd;
  for (int v = 0; v < vectors; ++v) {
    float x[1][kEach];
    load_row<1, kWide>(g, a.input, f.x, row, a.columns, v, 0.0f, x);
    write_vector<kWide>(g, a, f, row, v, m, x);
  }
}

// What a thread has of a row: the gradient of the output (0 beyond the row), and the normalised values.
template <bool kWide, bool kInput>
__device__ __forceinline__ void read_gradient(const Group& g, const NormArgs& a, const NormBackward& b, int64_t row,
                                              int columns, int v, float mean, float rstd, float (&gradient)[1][kEach],
                                              float (&value)[1][kEach], float (&gamma)[1][kEach]) {
  load_row<1, kWide>(g, a.output, b.gradient, row, columns, v, 0.0f, gradient);
  load_row<1, kWide>(g, kInput ? a.input : a.output, b.saved, row, columns, v, 0.0f, value);
  if constexpr (kInput) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) value[0][k] = normalized<Lane>(value[0][k], mean, rstd);
  } else if (a.bias) {  // before gamma is loaded, which saves registers
    float beta[1][kEach];
    load_beta<1, kWide>(g, a, v, beta);
#pragma unroll
    for (int k = 0; k < kEach; ++k) value[0][k] -= beta[0][k];
  }
  load_gamma<1, kWide>(g, a, v, gamma);
  if constexpr (!kInput)
    if (a.weight) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) value[0][k] = recovered<Lane>(value[0][k], 0.0f, Lane::reciprocal(gamma[0][k]));
    }
}

template <bool kWide>
__device__ __forceinline__ void add_sums(const Group& g, const NormArgs& a, float* sums, int v, const float (&x)[kEach],
                                         bool fresh) {
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (inside<kWide>(g, v, k, a.columns)) {
      float& to = sums[g.at<kWide>(v, k)];
      to = fresh ? x[k] : to + x[k];
    }
}

// sums: [gridDim.x, 2, columns], the sums over a block's rows for dweight and dbias; null where not wanted. Block i has
// rows [i * rows / grid, (i + 1) * rows / grid).
template <bool kWide, bool kInput, int kThreads>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(NormArgs a, NormBackward b, float* sums) {
  __shared__ float part[2][kMostWarps][2];
  GroupSum<2> sum = {part};
  const Group g;
  const int64_t begin = int64_t(blockIdx.x) * a.rows / gridDim.x, end = (int64_t(blockIdx.x) + 1) * a.rows / gridDim.x;
  const int rows = int(end - begin);
  float dweight[kEach] = {}, dbias[kEach] = {};
  for (int first = 0; first < rows; first += blockDim.y) {
    const int i = first + threadIdx.y;
    const int64_t r = begin + i, row = r * a.columns;
    const int columns = i < rows ? int(a.columns) : 0;
    const float rstd = i < rows ? static_cast<const float*>(b.rstd)[r] : 0.0f;
    float mean = 0.0f;
    if (kInput && a.centered) {
      float x[1][kEach];
      load_row<1, kWide>(g, a.input, b.saved, row, columns, 0, 0.0f, x);
      mean = moments(g, a, sum, [&](auto&& run) {
               for (int k = 0; k < kEach; ++k)
                 if (inside<kWide>(g, 0, k, columns)) run(x[0][k]);
             }).mean;
    }
    float gradient[1][kEach], value[1][kEach], gamma[1][kEach], s[2] = {};
    read_gradient<kWide, kInput>(g, a, b, row, columns, 0, mean, rstd, gradient, value, gamma);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (inside<kWide>(g, 0, k, columns)) {
        dweight[k] += gradient[0][k] * value[0][k];
        dbias[k] += gradient[0][k];
        gradient[0][k] *= gamma[0][k];
        s[0] += gradient[0][k];
        s[1] += gradient[0][k] * value[0][k];
      }
    sum(g, s);
    const float share = __frcp_rn(float(a.columns)), mean_g = a.centered ? s[0] * share : 0.0f, mean_gx = s[1] * share;
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      gradient[0][k] = input_gradient<Lane>(gradient[0][k], value[0][k], mean_g, mean_gx, rstd);
    store_row<1, kWide>(g, a.input, b.dx, row, columns, 0, gradient);
  }
  if (sums == nullptr) return;
  sums += int64_t(blockIdx.x) * 2 * a.columns;
  for (int group = 0; group < blockDim.y; ++group) {  // in order; each thread's column is its own in its group
    if (threadIdx.y == group) {
      add_sums<kWide>(g, a, sums, 0, dweight, group == 0);
      add_sums<kWide>(g, a, sums + a.columns, 0, dbias, group == 0);
    }
    __syncthreads();
  }
}

template <bool kWide, bool kInput>
__global__ void __launch_bounds__(kLongThreads)
    long_norm_backward_kernel(NormArgs a, NormBackward b, float* sums, int vectors) {
  __shared__ float part[2][kMostWarps][2];
  GroupSum<2> sum = {part};
  const Group g;
  const int64_t begin = int64_t(blockIdx.x) * a.rows / gridDim.x, end = (int64_t(blockIdx.x) + 1) * a.rows / gridDim.x;
  if (sums != nullptr) {
    sums += int64_t(blockIdx.x) * 2 * a.columns;
    if (begin == end)
      for (int64_t j = g.thread; j < 2 * a.columns; j += g.threads) sums[j] = 0.0f;
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * a.columns;
    const float rstd = static_cast<const float*>(b.rstd)[r];
    const float mean = kInput && a.centered ? long_moments<kWide>(g, a, sum, b.saved, row, vectors).mean : 0.0f;
    float gradient[1][kEach], value[1][kEach], gamma[1][kEach], s[2] = {};
    for (int v = 0; v < vectors; ++v) {
      read_gradient<kWide, kInput>(g, a, b, row, a.columns, v, mean, rstd, gradient, value, gamma);
      float product[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        product[k] = gradient[0][k] * value[0][k];
        if (inside<kWide>(g, v, k, a.columns)) {
          const float scaled = gradient[0][k] * gamma[0][k];
          s[0] += scaled;
          s[1] += scaled * value[0][k];
        }
      }
      if (sums == nullptr) continue;
      add_sums<kWide>(g, a, sums, v, product, r == begin);
      add_sums<kWide>(g, a, sums + a.columns, v, gradient[0], r == begin);
    }
    sum(g, s);
    const float share = __frcp_rn(float(a.columns)), mean_g = a.centered ? s[0] * share : 0.0f, mean_gx = s[1] * share;
    for (int v = 0; v < vectors; ++v) {
      read_gradient<kWide, kInput>(g, a, b, row, a.columns, v, mean, rstd, gradient, value, gamma);
#pragma unroll
      for (int k = 0; k < kEach; ++k)
        gradient[0][k] = input_gradient<Lane>(gradient[0][k] * gamma[0][k], value[0][k], mean_g, mean_gx, rstd);
      store_row<1, kWide>(g, a.input, b.dx, row, a.columns, v, gradient);
    }
  }
}

// out[j] = the sum over blocks of sums[block, j]: in slices of every kSumSlices-th block, then over slices in order.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    norm_sum_kernel(const float* sums, int64_t blocks, int64_t columns, Dtype dtype, void* out) {
  __shared__ float part[kSumSlices][kSumColumns];
  const int64_t j = int64_t(blockIdx.x) * kSumColumns + threadIdx.x;
  float s = 0.0f;
  if (j < columns)
#pragma unroll 4
    for (int64_t block = threadIdx.y; block < blocks; block += kSumSlices) s += sums[block * 2 * columns + j];
  part[threadIdx.y][threadIdx.x] = s;
  __syncthreads();
  if (threadIdx.y > 0 || j >= columns) return;
  for (int i = 1; i < kSumSlices; ++i) s += part[i][threadIdx.x];
  with_dtype(dtype, [&](auto t) {
    constexpr Dtype T = decltype(t)::value;
    static_cast<Storage<T>*>(out)[j] = rounded<T>(s);
  });
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if ((reinterpret_cast<uintptr_t>(p) & 15) != 0) return false;
  return true;
}

// Threads of a group that holds its row, or none where they would be more than `most`, and groups of a block.
dim3 block_of(int64_t columns, int most) {
  if (columns > int64_t(most) * kEach) return dim3(kLongThreads, 1);
  const unsigned threads = unsigned((columns + kWarp * kEach - 1) / (kWarp * kEach)) * kWarp;
  return dim3(threads, std::max(1u, kBlockThreads / threads));
}

int vectors_of(int64_t columns) { return int((columns + kLongThreads * kEach - 1) / (kLongThreads * kEach)); }

unsigned row_blocks(int64_t rows, dim3 block) { return unsigned((rows + block.y - 1) / block.y); }

template <bool kWide, int kThreads>
void launch_norm(const NormArgs& a, const NormForward& f, CUstream_st* stream) {
  const dim3 block = block_of(a.columns, kThreads);
  norm_kernel<kWide, kThreads><<<row_blocks(a.rows, block), block, 0, stream>>>(a, f);
}

// kThreads: of a group that holds its row; as many as registers allow.
template <bool kWide, bool kInput, int kThreads>
void launch_backward(const NormArgs& a, const NormBackward& b, float* sums, CUstream_st* stream) {
  const dim3 block = block_of(a.columns, kThreads);
  const unsigned grid = sums ? unsigned(norm_blocks(a.rows)) : row_blocks(a.rows, block);
  if (a.columns > int64_t(kThreads) * kEach)
    long_norm_backward_kernel<kWide, kInput><<<grid, block, 0, stream>>>(a, b, sums, vectors_of(a.columns));
  else
    norm_backward_kernel<kWide, kInput, kThreads><<<grid, block, 0, stream>>>(a, b, sums);
}

}  // namespace

int64_t norm_blocks(int64_t rows) { return std::max<int64_t>(1, std::min(rows / kSumRows, kSumBlocks)); }

int norm(const NormArgs& a, const NormForward& f, CUstream_st* stream) {
  const bool wide = a.columns % kEach == 0 && aligned({f.x, f.y, a.weight, a.bias});
  if (wide && a.columns <= 512 * kEach)
    launch_norm<true, 512>(a, f, stream);
  else if (a.columns <= 1024 * kEach)
    (wide ? launch_norm<true, 1024> : launch_norm<false, 1024>)(a, f, stream);
  else
    (wide ? long_norm_kernel<true>
          : long_norm_kernel<false>)<<<row_blocks(a.rows, dim3(kLongThreads)), kLongThreads, 0, stream>>>(
        a, f, vectors_of(a.columns));
  return cudaGetLastError();
}

int norm_backward(const NormArgs& a, const NormBackward& b, float* sums, CUstream_st* stream) {
  const bool wide = a.columns % kEach == 0 && aligned({b.gradient, b.saved, b.dx, a.weight, a.bias});
  if (b.from_input)
    (wide ? launch_backward<true, true, 512> : launch_backward<false, true, 512>)(a, b, sums, stream);
  else
    (wide ? launch_backward<true, false, 1024> : launch_backward<false, false, 512>)(a, b, sums, stream);
  const auto total = [&](int which, Dtype dtype, void* out) {
    const unsigned columns = unsigned((a.columns + kSumColumns - 1) / kSumColumns);
    norm_sum_kernel<<<columns, dim3(kSumColumns, kSumSlices), 0, stream>>>(sums + which * a.columns,
                                                                           norm_blocks(a.rows), a.columns, dtype, out);
  };
  if (b.dweight) total(0, a.weight_dtype, b.dweight);
  if (b.dbias) total(1, a.bias_dtype, b.dbias);
  return cudaGetLastError();
}

}  // namespace pyzo::cuda
