// 16-bit floats as kernels hold them: two in a word, eight in a vector that is one access of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparse24::cuda {

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

// Two words of 16 bits, as bits.
__device__ __forceinline__ uint32_t pack16(uint16_t lo, uint16_t hi) { return uint32_t(lo) | uint32_t(hi) << 16; }

// Eight elements.
struct alignas(16) Vec8 {
  uint32_t w[4];
  __device__ __forceinline__ uint16_t operator[](int i) const { return uint16_t(i % 2 ? w[i / 2] >> 16 : w[i / 2]); }
};

// Through the read-only cache.
__device__ __forceinline__ Vec8 load16(const void* p) {
  Vec8 v;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p));
  return v;
}
__device__ __forceinline__ void store16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  *static_cast<uint4*>(p) = make_uint4(a, b, c, d);
}

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
// Stores where a condition holds, without a branch, around which nothing could be scheduled.
__device__ __forceinline__ void store4_if(bool condition, void* p, uint32_t w) {
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.global.u32 [%1], %2;\n}" ::"r"(uint32_t(condition)),
               "l"(p), "r"(w)
               : "memory");
}
__device__ __forceinline__ void store16_if(bool condition, void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("{\n .reg .pred p;\n setp.ne.u32 p, %0, 0;\n @p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   uint32_t(condition)),
               "l"(p), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
#endif

}  // namespace sparse24::cuda
