// Asynchronous copies to shared memory, loads, and the order of dependent launches: the PTX behind them.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, or zeros where `exists` is false: then nothing is read.
__device__ __forceinline__ void copy16_async(uint32_t to, const void* from, bool exists = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the newest kGroups groups of this thread are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// A weight that is read once: it shall not displace what other threads read again.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ---- with a predicate: where lanes differ, a branch around each access would cost more than the access ----

// What load_once gives where `exists` is not zero; v stays where it is, and then nothing is read.
__device__ __forceinline__ uint4 load_once_if(uint32_t exists, uint4 v, const void* p) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %5, 0;\n\t"
      "@exists ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(exists));
  return v;
}
// The same of what a kernel before this one may still have written when this one started.
__device__ __forceinline__ uint4 load_if(uint32_t exists, uint4 v, const void* p) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %5, 0;\n\t"
      "@exists ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(exists)
      : "memory");
  return v;
}
// Brings 128 bytes to the second-level cache, and 16 of them to where nobody needs them: prefetch.global.L2 would do
// without, but a warp's takes many times as long.
__device__ __forceinline__ void prefetch_if(uint32_t exists, uint32_t to, const void* p) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %2, 0;\n\t"
      "@exists cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n\t}" ::"r"(to),
      "l"(p), "r"(exists));
}

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

// ---- dependent launches ----

// The kernel behind this one may start; it waits for the results.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernels before this one are complete, if it was launched as dependent on them.
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sparse24::cuda
