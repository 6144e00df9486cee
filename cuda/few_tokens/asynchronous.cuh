// Asynchronous copies to shared memory, and accesses that depend on a condition: the PTX behind them.
#pragma once

#include <cstdint>

#include "common/dependent_launches.cuh"

namespace sparse24::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the newest kGroups groups of this thread are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// What is read once does not stay in the second-level cache.
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// 16 bytes where `exists` is not zero: where lanes differ, a branch would cost more than the access. For weights, which
// are read in order.
__device__ __forceinline__ void copy16_if(uint32_t exists, uint32_t to, const void* from, uint64_t policy) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %2, 0;\n\t"
      "@exists cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %3;\n\t}" ::"r"(to),
      "l"(from), "r"(exists), "l"(policy)
      : "memory");
}

// 16 bytes where `exists` is not zero.
__device__ __forceinline__ void copy16_if(uint32_t exists, uint32_t to, const void* from) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %2, 0;\n\t"
      "@exists cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n\t}" ::"r"(to),
      "l"(from), "r"(exists)
      : "memory");
}
// 16 bytes, or zeros: then nothing is read.
__device__ __forceinline__ void copy16_or_zeros(bool exists, uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
// The same with fewer instructions.
__device__ __forceinline__ void copy16_if_else_zeros(uint32_t exists, uint32_t to, const void* from) {
  asm volatile(
      "{\n\t.reg .pred missing;\n\tsetp.eq.u32 missing, %2, 0;\n\t"
      "cp.async.cg.shared.global [%0], [%1], 16, missing;\n\t}" ::"r"(to),
      "l"(from), "r"(exists)
      : "memory");
}
// Warps that share a barrier wait for each other; barrier 0 is that of __syncthreads.
template <int kThreads>
__device__ __forceinline__ void wait_at_barrier(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// c += y * w where y is not zero, in float32.
__device__ __forceinline__ void multiply_add_if(float y, const float (&w)[8], float (&c)[8]) {
  asm("{\n\t.reg .pred used;\n\tsetp.neu.f32 used, %8, 0f00000000;\n\t"
      "@used fma.rn.f32 %0, %8, %9, %0;\n\t@used fma.rn.f32 %1, %8, %10, %1;\n\t"
      "@used fma.rn.f32 %2, %8, %11, %2;\n\t@used fma.rn.f32 %3, %8, %12, %3;\n\t"
      "@used fma.rn.f32 %4, %8, %13, %4;\n\t@used fma.rn.f32 %5, %8, %14, %5;\n\t"
      "@used fma.rn.f32 %6, %8, %15, %6;\n\t@used fma.rn.f32 %7, %8, %16, %7;\n\t}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
      : "f"(y), "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]), "f"(w[4]), "f"(w[5]), "f"(w[6]), "f"(w[7]));
}
__device__ __forceinline__ void multiply_add_if(float y, const float (&w)[6], float (&c)[6]) {
  asm("{\n\t.reg .pred used;\n\tsetp.neu.f32 used, %6, 0f00000000;\n\t"
      "@used fma.rn.f32 %0, %6, %7, %0;\n\t@used fma.rn.f32 %1, %6, %8, %1;\n\t"
      "@used fma.rn.f32 %2, %6, %9, %2;\n\t@used fma.rn.f32 %3, %6, %10, %3;\n\t"
      "@used fma.rn.f32 %4, %6, %11, %4;\n\t@used fma.rn.f32 %5, %6, %12, %5;\n\t}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5])
      : "f"(y), "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]), "f"(w[4]), "f"(w[5]));
}
__device__ __forceinline__ void multiply_add_if(float y, const float (&w)[4], float (&c)[4]) {
  asm("{\n\t.reg .pred used;\n\tsetp.neu.f32 used, %4, 0f00000000;\n\t"
      "@used fma.rn.f32 %0, %4, %5, %0;\n\t@used fma.rn.f32 %1, %4, %6, %1;\n\t"
      "@used fma.rn.f32 %2, %4, %7, %2;\n\t@used fma.rn.f32 %3, %4, %8, %3;\n\t}"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "f"(y), "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]));
}

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint32_t load_shared1(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_half(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

}  // namespace sparse24::cuda
