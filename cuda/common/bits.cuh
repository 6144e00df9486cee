// Instructions on the bytes and bits of a word that C++ has no name for.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

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

}  // namespace sparse24::cuda
