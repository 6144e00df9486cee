// Lists of what is active, as a warp makes them.
#pragma once

#include "few_tokens/active_lists.h"

namespace sparse24::cuda {

// y of eight tokens, `pitch` elements apart: zeros for those from `tokens` on, and in place of negative ones.
__device__ __forceinline__ uint4 eight_tokens(const uint16_t* y, int64_t pitch, int tokens) {
  uint32_t v[kListTokens];
#pragma unroll
  for (int t = 0; t < kListTokens; ++t) v[t] = t < tokens ? y[t * pitch] : 0;
#pragma unroll
  for (int t = 0; t < kListTokens; ++t) v[t] = (v[t] & 0x7fffu) != 0 ? v[t] : 0;
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
}

__device__ __forceinline__ bool is_active(const uint4& y) { return (y.x | y.y | y.z | y.w) != 0; }

// A warp appends those of its lanes' neurons that are active, behind `count` others; `y`: of the eight tokens. Returns
// how many there are then.
__device__ __forceinline__ int append_active(const ActiveLists& lists, int list, int count, const uint4& y,
                                             int neuron) {
  const uint32_t all = __ballot_sync(0xffffffffu, is_active(y));
  if (is_active(y)) {
    const int64_t at = int64_t{list} * lists.capacity + count + __popc(all & ((1u << threadIdx.x % 32) - 1));
    lists.neurons[at] = uint32_t(neuron);
    lists.values[at] = y;
  }
  return count + __popc(all);
}

}  // namespace sparse24::cuda
