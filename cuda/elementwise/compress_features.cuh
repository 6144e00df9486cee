// compress along features (dim = -1): X [R, C] row-major to values [R, C/2] and the metadata of A = X.
//
// A lane owns 16 neighbouring columns of a row: it reads 32 bytes, and writes 8 kept values and two bytes of metadata.
// Columns from C to the metadata's padding and rows from R to its padding read as zeros, which compress to the padding
// nibble, so that no case distinguishes them.
#pragma once

#include "common/activation.cuh"
#include "common/float8.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "sparse24/format.h"
#include "sparse24/quantize.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

// Sixteen neighbouring elements of a row.
struct Segment {
  Vec8 v[2];

  template <class A>
  __device__ __forceinline__ static Segment load(const A& activation, const void* row, int64_t col, bool valid) {
    if (!valid) return {};
    const char* p = static_cast<const char*>(row) + 2 * col;
    return {{activation.load(p), activation.load(p + 16)}};
  }
  template <class A>
  __device__ __forceinline__ Group<A> group(const A& activation, int g) const {
    const Vec8& half = v[g / 2];
    return {activation, half.w[g % 2 * 2], half.w[g % 2 * 2 + 1]};
  }
};

inline constexpr int kRows16 = 16;      // rows of a CTA, which share the 128-byte pieces of 16-bit metadata
inline constexpr int kColumns16 = 512;  // columns of a CTA: one warp wide
inline constexpr int kThreads16 = 256;

// Compresses to 16-bit values. A CTA has 16 rows x 512 columns, a warp per row. Metadata is gathered in shared memory,
// because a row's two bytes alone would be scattered over memory.
template <class A>
__global__ void __launch_bounds__(kThreads16)
    compress_features_16bit(const typename A::T* x, int64_t rows, int64_t cols, Operand a, typename A::T* values,
                            uint8_t* meta, int column_blocks, A activation) {
  // A K block of 64 has the 128 bytes that format.h draws, and 16 bytes of padding against bank conflicts.
  __shared__ alignas(16) uint16_t tile[kColumns16 / 64][64 + 8];
  const int64_t row_group = blockIdx.x / column_blocks;
  const int64_t col0 = int64_t(blockIdx.x % column_blocks) * kColumns16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t col = col0 + 16 * lane;

  Segment segment[kRows16 / 8];
#pragma unroll
  for (int i = 0; i < kRows16 / 8; ++i) {
    const int64_t row = row_group * kRows16 + 8 * i + warp;
    segment[i] = Segment::load(activation, x + row * cols, col, row < rows && col < cols);
  }
#pragma unroll
  for (int i = 0; i < kRows16 / 8; ++i) {
    const int64_t row = row_group * kRows16 + 8 * i + warp;
    uint32_t kept[4], nibbles = 0xffff;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const auto group = segment[i].group(activation, g);
      kept[g] = group.kept_16bit();
      nibbles -= group.kept.complement << (4 * g);
    }
    if (row < rows && col < cols) store16(values + row * (cols / 2) + col / 2, kept[0], kept[1], kept[2], kept[3]);
    tile[lane / 4][(lane % 2) * 32 + warp * 4 + (lane / 2 % 2) * 2 + i] = uint16_t(nibbles);
  }
  __syncthreads();
  const int block = threadIdx.x / 8, piece = threadIdx.x % 8;  // 8 pieces of 16 bytes per K block
  if (block < kColumns16 / 64 && col0 + 64 * block < a.k_meta) {
    uint8_t* out = meta + (col0 / 64 + block) * a.m_meta * 8 + row_group * 128;
    reinterpret_cast<uint4*>(out)[piece] = reinterpret_cast<const uint4*>(tile[block])[piece];
  }
}

inline constexpr int kMaxThreads8 = 512;

// Compresses to fp8 values. A CTA has a row, or a block of its columns where the scale is given. Lanes own two segments
// at a time, of which even lanes store the first of both neighbours and odd lanes the second, so that stores have 16
// bytes. With kComputeScale the row stays in registers between its maximum and its values, so that X is read once.
template <class A, int kSegments, bool kComputeScale>
__global__ void __launch_bounds__(kMaxThreads8)
    compress_features_fp8(const typename A::T* x, int64_t rows, int64_t cols, Operand a, uint8_t* values, uint8_t* meta,
                          const float* given_scale, int scale_stride, float* computed_scale, int column_blocks,
                          A activation) {
  static_assert(kSegments % 2 == 0, "lanes trade one segment for another");
  const int64_t row = blockIdx.x / column_blocks;
  const uint32_t col0 = blockIdx.x % column_blocks * kSegments * blockDim.x * 16 + threadIdx.x * 16;
  const uint32_t step = blockDim.x * 16;  // from a segment of this lane to its next
  const int lane = threadIdx.x % 32;

  Segment segment[kSegments];
#pragma unroll
  for (int s = 0; s < kSegments; ++s) {
    segment[s] = Segment::load(activation, x + row * cols, col0 + s * step, row < rows && col0 + s * step < cols);
  }

  float scale = 1.f;
  if constexpr (kComputeScale) {
    __shared__ float partial[kMaxThreads8 / 32];
    typename A::P m{};
#pragma unroll
    for (int s = 0; s < kSegments; ++s) m = activation.max(activation.max(m, segment[s].v[0]), segment[s].v[1]);
    const float warp_amax = warp_max(activation.activated_max(m));
    if (lane == 0) partial[threadIdx.x / 32] = warp_amax;
    __syncthreads();
    scale = scale_of(warp_max(lane < blockDim.x / 32 ? partial[lane] : 0.f));
    if (threadIdx.x == 0 && row < rows) computed_scale[row] = scale;
  } else if (row < rows) {
    scale = usable_scale(given_scale[row * scale_stride]);
  }
  const float inverse = __frcp_rn(scale);

  const bool odd = lane % 2;
#pragma unroll
  for (int first = 0; first < kSegments; first += 2) {
    uint32_t kept[2][2], nibbles[2] = {0xffff, 0xffff};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto g0 = segment[first + s].group(activation, 2 * half);
        const auto g1 = segment[first + s].group(activation, 2 * half + 1);
        kept[s][half] = pack16(g0.kept_e4m3(inverse), g1.kept_e4m3(inverse));
        nibbles[s] -= (g0.kept.complement + g1.kept.complement * 16) << (8 * half);
      }
    }
    // This is the lane's first column in the segment that it stores, and that of the 8 lanes whose metadata lie
    // together.
    const uint32_t col = col0 + (first + odd) * step - 16 * odd;
    // A lane stores 8 bytes of values of its own and 8 of its neighbour's.
    const uint32_t got0 = __shfl_xor_sync(0xffffffffu, odd ? kept[0][0] : kept[1][0], 1);
    const uint32_t got1 = __shfl_xor_sync(0xffffffffu, odd ? kept[0][1] : kept[1][1], 1);
    if (row < rows && col < cols) {
      uint8_t* out = values + (row * cols + col) / 2;
      odd ? store16(out, got0, got1, kept[1][0], kept[1][1]) : store16(out, kept[0][0], kept[0][1], got0, got1);
    }
    // Three exchanges bring the 16 bytes of metadata of 128 columns together from 8 lanes.
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? nibbles[0] : nibbles[1], 1);
    uint32_t w[4];
    w[0] = odd ? got | nibbles[1] << 16 : nibbles[0] | got << 16;
    w[1] = __shfl_xor_sync(0xffffffffu, w[0], 2);
    w[2] = __shfl_xor_sync(0xffffffffu, w[0], 4);
    w[3] = __shfl_xor_sync(0xffffffffu, w[1], 4);
    if (lane % 8 < 2 && col < a.k_meta) store16(meta + (col / 128 * a.m_meta + row) * 16, w[0], w[1], w[2], w[3]);
  }
}

}  // namespace sparse24::cuda
