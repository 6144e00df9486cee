// Which neurons tokens use, and their activations: what the first product leaves for the second one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sparse24::cuda {

// The tokens of a list.
inline constexpr int kListTokens = 8;

// A list for each eight tokens in each slice of the neurons (kActiveSlices): the neurons that one of them uses.
struct ActiveLists {
  uint32_t* neurons;  // [slices][groups][capacity]: counts in its slice, ascending
  uint4* values;      // [slices][groups][capacity]: y of the eight tokens, 16 bits each; no negative zeros
  int* counts;        // [slices][groups]
  int tokens, groups, capacity;
};

}  // namespace sparse24::cuda
