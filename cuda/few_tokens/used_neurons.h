// What the first product leaves for the second one where tokens are so many that most neurons are used.
#pragma once

#include <cstdint>

namespace sparse24::cuda {

// Neurons whose rows of W2 are multiplied together: a step of the second product.
inline constexpr int kStepNeurons = 32;

struct UsedNeurons {
  uint16_t* y;  // [tokens][pitch], of 16 bits; `pitch` is a multiple of eight, what lies behind a row is not read
  int64_t pitch;
  uint8_t* used;  // [neurons, rounded up to steps]: 1 where a token uses it, else 0
};

}  // namespace sparse24::cuda
