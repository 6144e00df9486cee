// Exchanges between the lanes of a warp: transposes in registers, which turn accumulator fragments into rows or
// columns, and the maximum.
#pragma once

#include <cmath>
#include <cstdint>

namespace sparse24::cuda {

// Lanes l and l ^ kLanes, of which one is the high one, hold words a and b each; afterwards the low lane holds both a
// and the high lane both b, that of the low lane first: a 2 x 2 transpose.
template <int kLanes>
__device__ __forceinline__ void transpose_pair(uint32_t& a, uint32_t& b, bool high) {
  const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? a : b, kLanes);
  (high ? a : b) = got;
}

// Lane q of four, kStride apart, holds word b of row q; afterwards it holds word q of rows 0 .. 3: a 4 x 4 transpose.
template <int kStride = 1>
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int q) {
#pragma unroll
  for (int i = 0; i < 2; ++i) transpose_pair<2 * kStride>(w[i], w[i + 2], q & 2);
#pragma unroll
  for (int i = 0; i < 4; i += 2) transpose_pair<kStride>(w[i], w[i + 1], q & 1);
}

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts

// Transposes an 8 x 8 matrix of 16-bit elements held as a fragment over the warp.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t fragment) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(fragment));
  return out;
}

#endif

// The largest v of the warp, in all lanes.
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}

}  // namespace sparse24::cuda
