// The neurons of a range that some token uses, as a list in shared memory, in ascending order.
#pragma once

#include "common/vocabulary.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// Bit i: neuron `first + i` of 8 is used by some token. Neurons from `end` on are not there.
//
// `words`: every row of y, and `first`, is a multiple of 16 bytes.
__device__ __forceinline__ uint32_t used_of_eight(const uint16_t* y, const uint8_t* active, int tokens,
                                                  int64_t features, int64_t first, int64_t end, bool words) {
  if (first >= end) return 0;
  uint32_t used = 0;
  if (active != nullptr) {
    if (first + 8 <= end) {
      const uint2 flags = *reinterpret_cast<const uint2*>(active + first);
#pragma unroll
      for (int i = 0; i < 8; ++i) used |= uint32_t((((i < 4 ? flags.x : flags.y) >> (8 * (i % 4))) & 0xff) != 0) << i;
    } else {
      for (int i = 0; first + i < end; ++i) used |= uint32_t(active[first + i] != 0) << i;
    }
    return used;
  }
  if (words) {
    uint4 any{0, 0, 0, 0};
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
      const uint4 v = *reinterpret_cast<const uint4*>(y + t * features + first);
      any = {any.x | v.x, any.y | v.y, any.z | v.z, any.w | v.w};
    }
    const uint32_t pairs[4] = {any.x, any.y, any.z, any.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      used |= uint32_t((pairs[i] & 0x7fffu) != 0) << (2 * i) | uint32_t((pairs[i] & 0x7fff0000u) != 0) << (2 * i + 1);
    }
    return used;
  }
  for (int i = 0; i < 8 && first + i < end; ++i) {
    uint32_t any = 0;
#pragma unroll 4
    for (int t = 0; t < tokens; ++t) any |= y[t * features + first + i];
    used |= uint32_t((any & 0x7fff) != 0) << i;
  }
  return used;
}

// Writes the positions of all set bits, thread by thread, to `list`, and returns how many there are. The block's
// threads call it together; `totals` has an element for each warp. The list can be read when it returns.
template <int kWarps>
__device__ __forceinline__ int list_used(uint32_t used, uint16_t* list, int* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = __popc(used);
  int upto = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += before;
  }
  if (lane == 31) totals[warp] = upto;
  __syncthreads();
  int at = upto - mine, count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    at += w < warp ? totals[w] : 0;
    count += totals[w];
  }
  for (; used != 0; used &= used - 1) list[at++] = uint16_t(8 * threadIdx.x + __ffs(int(used)) - 1);
  __syncthreads();
  return count;
}

}  // namespace sparse24::cuda
