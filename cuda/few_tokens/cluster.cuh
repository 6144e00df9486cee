// Blocks of a cluster: how they wait for each other, and read each other's shared memory. The PTX behind it.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

// Whole warps of all blocks, but for those that have left: what each wrote to shared memory is there for all.
__device__ __forceinline__ void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The place of an address in shared memory in that of block `rank`.
__device__ __forceinline__ uint32_t in_block_of_cluster(uint32_t shared, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}
__device__ __forceinline__ float4 load_of_cluster4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

}  // namespace sparse24::cuda
