/// @file
/// The CUDA built-ins that the epilogues and densest_features use, exact, for a host compiler; and the names that
/// CUTLASS's headers expect.
///
/// The conversions and the arithmetic of bfloat16, float16 and fp8 are those of the toolkit's own headers, which have
/// host versions of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>

#include "emulator/block.h"

// ---- of one thread
// ---------------------------------------------------------------------------------------------------

inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline int __float_as_int(float v) {
  int bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
// Rounded to nearest: what the operators do, compiled without contraction.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return out;
}

inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }

// One host thread runs them all: nothing comes between.
inline int atomicMax(int* to, int v) {
  const int old = *to;
  *to = max(old, v);
  return old;
}
inline int atomicAdd(int* to, int v) {
  const int old = *to;
  *to = old + v;
  return old;
}

// ---- of the warp
// -----------------------------------------------------------------------------------------------------

namespace sparse24::emulate {

inline void expect_whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("expected an instruction of all 32 lanes");
}

}  // namespace sparse24::emulate

template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask) {
  static_assert(sizeof(T) == 4);
  sparse24::emulate::expect_whole_warp(mask);
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const auto& lanes = sparse24::emulate::Block::current().exchange("shfl.xor", lane_mask, bits);
  std::memcpy(&v, &lanes[(threadIdx.x ^ lane_mask) % 32], 4);
  return v;
}

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  static_assert(sizeof(T) == 4);
  sparse24::emulate::expect_whole_warp(mask);
  if (width != 32) throw std::runtime_error("expected lanes of the whole warp");
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  // Lanes may ask for different ones.
  const auto& lanes = sparse24::emulate::Block::current().exchange("shfl.idx", 0, bits);
  std::memcpy(&v, &lanes[lane % 32], 4);
  return v;
}

inline int __reduce_add_sync(unsigned mask, int v) {
  sparse24::emulate::expect_whole_warp(mask);
  uint32_t sum = 0;
  for (uint32_t lane : sparse24::emulate::Block::current().exchange("redux.add", 0, uint32_t(v))) sum += lane;
  return int(sum);
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned v) { return __reduce_add_sync(mask, int(v)); }

inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  sparse24::emulate::expect_whole_warp(mask);
  uint32_t all = 0;
  for (uint32_t lane : sparse24::emulate::Block::current().exchange("redux.or", 0, v)) all |= lane;
  return all;
}

/// The lanes below `distance` keep their values.
inline unsigned __shfl_up_sync(unsigned mask, unsigned v, unsigned distance) {
  sparse24::emulate::expect_whole_warp(mask);
  const auto& lanes = sparse24::emulate::Block::current().exchange("shfl.up", int(distance), v);
  const unsigned lane = threadIdx.x % 32;
  return lanes[lane < distance ? lane : lane - distance];
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  sparse24::emulate::expect_whole_warp(mask);
  unsigned bits = 0;
  const auto& lanes = sparse24::emulate::Block::current().exchange("vote.ballot", 0, predicate != 0);
  for (unsigned lane = 0; lane < 32; ++lane) bits |= lanes[lane] << lane;
  return bits;
}

// ---- of the block
// ----------------------------------------------------------------------------------------------------

inline void __syncthreads() { sparse24::emulate::Block::current().synchronize(); }

// ---- named by CUTLASS's headers, in what is never called here
// --------------------------------------------------------

inline uint3 blockIdx{};
inline dim3 blockDim, gridDim;
void __syncwarp(unsigned mask = 0xffffffffu);
int __dp4a(int, int, int);
__half2 __hfma2(__half2, __half2, __half2);
