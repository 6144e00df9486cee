// What the first product leaves for the second one where tokens are so many that most neurons are used.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

// Neurons whose rows of W2 are multiplied together: a step of the second product.
inline constexpr int kStepNeurons = 32;
// Blocks of each product: those that an H200 runs at once. No device is asked, for sums depend on it.
inline constexpr int64_t kUsedBlocks = 132;

struct UsedNeurons {
  uint16_t* y;    // [tokens][pitch], of 16 bits; zeros behind the last neuron
  int64_t pitch;  // the neurons, rounded up to steps
  uint8_t* used;  // [pitch]: 1 where a token uses it, else 0
};

}  // namespace sparse24::cuda
