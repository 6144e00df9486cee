// Asynchronous copies to shared memory, loads, and the order of dependent launches: the PTX behind them.
#pragma once

#include <cstdint>

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

// 16 bytes where `exists` is not zero: where lanes differ, a branch would cost more than the access. For weights, which
// are read in order.
__device__ __forceinline__ void copy16_if(uint32_t exists, uint32_t to, const void* from) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %2, 0;\n\t"
      "@exists cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n\t}" ::"r"(to),
      "l"(from), "r"(exists)
      : "memory");
}

// 8 bytes of it, as half of the weights' bytes take.
__device__ __forceinline__ void copy8_if(uint32_t exists, uint32_t to, const void* from) {
  asm volatile(
      "{\n\t.reg .pred exists;\n\tsetp.ne.u32 exists, %2, 0;\n\t"
      "@exists cp.async.ca.shared.global.L2::128B [%0], [%1], 8;\n\t}" ::"r"(to),
      "l"(from), "r"(exists)
      : "memory");
}

__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ uint2 load_shared2(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared1(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared2(uint32_t address, uint32_t x, uint32_t y) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// ---- clusters of two blocks ----

// Where another block of the cluster has what lies at an address of this one.
__device__ __forceinline__ uint32_t address_of_block(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void store_cluster(uint32_t address, uint32_t v) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
// All threads of both blocks, whose stores before the one are seen after the other.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- dependent launches ----

// The kernel behind this one may start; it waits for the results.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernels before this one are complete, if it was launched as dependent on them.
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sparse24::cuda
