// Lists of what is active, as a warp makes them.
#pragma once

#include "few_tokens/active_lists.h"

namespace sparse24::cuda {

// A warp appends those of `rows` activations that are not zero, and returns how many there are then. `neuron`: that of
// the first one.
__device__ __forceinline__ int append_active(uint32_t* list, int count, const uint16_t* y, int rows, int neuron) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < rows; first += 32) {
    const int row = first + lane;
    const uint32_t value = row < rows ? y[row] : 0;
    const bool active = (value & 0x7fffu) != 0;
    const uint32_t all = __ballot_sync(0xffffffffu, active);
    if (active) list[count + __popc(all & ((1u << lane) - 1))] = value << 16 | uint32_t(neuron + row);
    count += __popc(all);
  }
  return count;
}

}  // namespace sparse24::cuda
