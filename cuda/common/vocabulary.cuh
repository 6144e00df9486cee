// Small device vocabulary: 16-byte accesses, 16-bit floats by the pair, the activations, fp8 conversion.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "sparse24/types.h"

namespace sparse24::cuda {

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Pair<__half> {
  using type = __half2;
};

// Bits of one element to fp32.
__device__ __forceinline__ float to_float(__nv_bfloat16, uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}
__device__ __forceinline__ float to_float(__half, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Two fp32 to a pair, rounded to nearest even; NaN becomes 0x7FFF for both types.
__device__ __forceinline__ uint32_t pack2(__nv_bfloat16, float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack2(__half, float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Whether kernels of T can store and be given an activation's root, relu(h), instead of its square: float16, whose
// squares underflow. Kernels of other types have no code for it.
template <class T>
inline constexpr bool kHasRoots = std::is_same_v<T, __half>;

// ---- 8 elements of 16 bits: one 16-byte access ----------------------------------------------------------------------

struct alignas(16) Vec8 {
  uint32_t w[4];
  __device__ __forceinline__ uint16_t operator[](int i) const { return uint16_t(i % 2 ? w[i / 2] >> 16 : w[i / 2]); }
};

__device__ __forceinline__ Vec8 load16(const void* p) {
  Vec8 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
  return v;
}
__device__ __forceinline__ void store16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(p) = make_uint4(a, b, c, d);
}
#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// __byte_perm without its masking of the selector, whose nibbles are below 8.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(lo), "r"(hi), "r"(selector));
  return out;
}
// By the last five bits of `shift`.
__device__ __forceinline__ uint32_t shift_left(uint32_t w, uint32_t shift) {
  uint32_t out;
  asm("shf.l.wrap.b32 %0, 0, %1, %2;" : "=r"(out) : "r"(w), "r"(shift));
  return out;
}
// Bits 15 and 31 to all bits of their halves.
__device__ __forceinline__ uint32_t spread_signs(uint32_t w) {
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(out) : "r"(w));
  return out;
}
#endif
__device__ __forceinline__ uint32_t pack16(uint16_t lo, uint16_t hi) { return uint32_t(lo) | uint32_t(hi) << 16; }

// ---- activations ----------------------------------------------------------------------------------------------------

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// max(x, 0) that propagates NaN, as torch.relu does (fmaxf would drop it).
__device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// The same of a pair, rounded as by pack2, in one instruction. Never a negative zero.
__device__ __forceinline__ uint32_t pack2_relu(__nv_bfloat16, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
__device__ __forceinline__ uint32_t pack2_relu(__half, float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
#endif

// The activation in fp32, from the 16-bit pre-activation.
template <Activation kAct>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kAct == Activation::kNone) return x;
  const float y = relu(x);
  return kAct == Activation::kRelu2 ? __fmul_rn(y, y) : y;
}

// ---- fp8 ------------------------------------------------------------------------------------------------------

// Two values to e4m3, rounded to nearest even, saturating; the first in the low byte.
__device__ __forceinline__ uint16_t to_e4m3x2(float lo, float hi) {
  return __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
}

// The dequantising scale of data whose largest finite magnitude is amax; compress.h has the rules.
__device__ __forceinline__ float scale_of(float amax) {
  return amax == 0.f ? 1.f : fmaxf(__fdiv_rn(amax, 448.f), FLT_MIN);
}

// Largest |activated| of 8 elements and `so_far`, both lanes of a pair apart; NaN does not count.
template <class T, Activation kAct>
__device__ __forceinline__ typename Pair<T>::type amax8(typename Pair<T>::type so_far, const Vec8& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    auto x = reinterpret_cast<const typename Pair<T>::type&>(v.w[i]);
    if constexpr (kAct == Activation::kNone) x = __habs2(x);
    so_far = __hmax2(so_far, x);
  }
  return so_far;
}

// Both lanes of such a running maximum to the activated fp32 value: activations grow with x, so it is enough to
// activate the maximum.
template <Activation kAct, class P>
__device__ __forceinline__ float activated_amax(P m) {
  const float x = fmaxf(0.f, fmaxf(float(m.x), float(m.y)));
  return kAct == Activation::kRelu2 ? __fmul_rn(x, x) : x;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}

}  // namespace sparse24::cuda
