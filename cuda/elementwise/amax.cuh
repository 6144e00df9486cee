// The largest |activation(x)| per tensor, row or column, and the scales that follow from it.
//
// Non-negative floats order like their bits, so atomicMax on the bits is exact and does not depend on the order.
#pragma once

#include "common/activation.cuh"
#include "common/float8.cuh"
#include "common/launch.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"

namespace sparse24::cuda {

inline constexpr int kAmaxThreads = 256;

__device__ __forceinline__ void atomic_max(float* target, float v) {
  atomicMax(reinterpret_cast<int*>(target), __float_as_int(v));
}

inline constexpr int kAmaxVectors = 8;  // vectors of a thread

// Computes amax[i] over all of the matrix i of x, which has a multiple of 8 elements.
template <class A>
__global__ void __launch_bounds__(kAmaxThreads)
    amax_tensor(const typename A::T* x, int64_t vectors, float* amax, A activation) {
  __shared__ float largest[kAmaxThreads / 32];
  const int64_t first = int64_t{blockIdx.x} * kAmaxVectors * kAmaxThreads + threadIdx.x;
  x += blockIdx.y * vectors * 8;
  amax += blockIdx.y;
  typename A::P m{};
#pragma unroll
  for (int i = 0; i < kAmaxVectors; ++i) {
    const int64_t at = first + i * kAmaxThreads;
    if (at < vectors) m = activation.max(m, activation.load(x + 8 * at));
  }
  const float v = warp_max(activation.activated_max(m));
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = v;
  __syncthreads();
  // All blocks of a matrix write to one place: one of them all, and only what is larger than what is there.
  if (threadIdx.x >= 32) return;
  const float of_block = warp_max(largest[threadIdx.x % (kAmaxThreads / 32)]);
  if (threadIdx.x == 0 && of_block > *static_cast<volatile float*>(amax)) atomic_max(amax, of_block);
}

template <class A>
void run_amax_tensor(const A& activation, const typename A::T* x, int64_t vectors, float* amax, cudaStream_t stream,
                     int64_t count = 1) {
  const dim3 blocks(unsigned(ceil_div(vectors, kAmaxVectors * kAmaxThreads)), unsigned(count));
  amax_tensor<A><<<blocks, kAmaxThreads, 0, stream>>>(x, vectors, amax, activation);
  check_launch("amax_tensor");
}

// Computes amax[r] over the columns of x [rows, cols], where cols is a multiple of 8.
template <class A>
__global__ void __launch_bounds__(kAmaxThreads)
    amax_rows(const typename A::T* x, int64_t cols, float* amax, int column_blocks, A activation) {
  const int64_t row = blockIdx.x / column_blocks;
  const int64_t first = int64_t(blockIdx.x % column_blocks) * kAmaxVectors * kAmaxThreads + threadIdx.x;
  typename A::P m{};
#pragma unroll
  for (int i = 0; i < kAmaxVectors; ++i) {
    const int64_t col = (first + i * kAmaxThreads) * 8;
    if (col < cols) m = activation.max(m, activation.load(x + row * cols + col));
  }
  const float v = warp_max(activation.activated_max(m));
  if (threadIdx.x % 32 == 0) atomic_max(amax + row, v);
}

inline constexpr int kAmaxRows = 128;  // rows of one CTA

// Computes amax[c] over the rows of x [rows, cols]. A thread owns 8 columns.
template <class A>
__global__ void __launch_bounds__(kAmaxThreads)
    amax_columns(const typename A::T* x, int64_t rows, int64_t cols, float* amax, int column_blocks, A activation) {
  const int64_t col = (int64_t(blockIdx.x % column_blocks) * kAmaxThreads + threadIdx.x) * 8;
  const int64_t row0 = int64_t(blockIdx.x / column_blocks) * kAmaxRows;
  if (col >= cols) return;
  typename A::P m[4] = {};
  const int64_t row_end = row0 + kAmaxRows < rows ? row0 + kAmaxRows : rows;
#pragma unroll 8
  for (int64_t row = row0; row < row_end; ++row) {
    const Vec8 v = activation.load(x + row * cols + col);
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = activation.max(m[i], v.w[i]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    auto one = m[i / 2];
    one.x = one.y = i % 2 ? one.y : one.x;
    atomic_max(amax + col + i, activation.activated_max(one));
  }
}

static __global__ void __launch_bounds__(kAmaxThreads) amax_to_scale(float* amax, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kAmaxThreads + threadIdx.x;
  if (i < count) amax[i] = scale_of(amax[i]);
}

// What one scale serves.
enum class ScaleOf { kTensor, kRow, kColumn };

// Computes the scale of x [rows, cols], or of each of its rows or columns.
template <class A>
void compute_scale(const A& activation, const typename A::T* x, int64_t rows, int64_t cols, ScaleOf of, float* scale,
                   cudaStream_t stream) {
  const int64_t count = of == ScaleOf::kTensor ? 1 : of == ScaleOf::kRow ? rows : cols;
  if (count == 0) return;
  check_cuda(cudaMemsetAsync(scale, 0, count * sizeof(float), stream), "cudaMemsetAsync");
  if (rows > 0 && cols > 0) {
    if (of == ScaleOf::kRow) {
      const int64_t column_blocks = ceil_div(cols, 8 * kAmaxVectors * kAmaxThreads);
      amax_rows<A><<<column_blocks * rows, kAmaxThreads, 0, stream>>>(x, cols, scale, int(column_blocks), activation);
      check_launch("amax_rows");
    } else if (of == ScaleOf::kColumn) {
      const int64_t column_blocks = ceil_div(cols, 8 * kAmaxThreads);
      amax_columns<A><<<column_blocks * ceil_div(rows, kAmaxRows), kAmaxThreads, 0, stream>>>(
          x, rows, cols, scale, int(column_blocks), activation);
      check_launch("amax_columns");
    } else {
      run_amax_tensor(activation, x, rows * cols / 8, scale, stream);
    }
  }
  amax_to_scale<<<ceil_div(count, kAmaxThreads), kAmaxThreads, 0, stream>>>(scale, count);
  check_launch("amax_to_scale");
}

}  // namespace sparse24::cuda
