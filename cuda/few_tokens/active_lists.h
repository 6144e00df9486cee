// Which neurons tokens use, and their activations: what the first product leaves for the second one.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

// A list for each token in each slice of the neurons (kActiveSlices).
struct ActiveLists {
  uint32_t* entries;  // [slices][tokens][capacity]: 16 bits of y above 16 bits of a neuron, which counts in its slice
  int* counts;        // [slices][tokens]
  int tokens, capacity;
};

}  // namespace sparse24::cuda
