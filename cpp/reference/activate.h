/// @file
/// The elementwise rules of compress: selection of two in four, scales. One definition for all references.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "reference/numeric.h"
#include "sparse24/activation.h"

namespace sparse24 {

/// Orders magnitudes; every NaN is the same, largest one.
inline uint32_t selection_key(float y) {
  const uint32_t bits = bits_of(y);
  return is_nan_bits(bits) ? kNanKey : bits & ~kSignBit;
}

/// Positions of the two largest keys, in ascending order; of equals the lower position wins.
struct Pair {
  int first, second;
  uint8_t nibble() const { return static_cast<uint8_t>(first | second << 2); }
};

inline Pair select_pair(const uint32_t (&key)[4]) {
  int largest = 0;
  for (int i = 1; i < 4; ++i) {
    if (key[i] > key[largest]) largest = i;
  }
  int next = largest == 0 ? 1 : 0;
  for (int i = next + 1; i < 4; ++i) {
    if (i != largest && key[i] > key[next]) next = i;
  }
  return {std::min(largest, next), std::max(largest, next)};
}

/// The scale that maps `amax` to the largest e4m3 number.
inline float scale_of_amax(float amax) { return amax == 0.0f ? 1.0f : std::max(amax / kLargestE4M3, FLT_MIN); }

/// max |activation(x)| of every row of x [rows, cols]; NaN does not count.
template <class In>
std::vector<float> row_amax(const typename In::Storage* x, int64_t rows, int64_t cols,
                            const ActivationArgs& activation) {
  auto amax = make_buffer<float>(rows);
  parallel_for(rows, cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float largest = 0.0f;
      for (int64_t c = 0; c < cols; ++c) {
        const float y = std::fabs(activation.value(In::load(x[r * cols + c])));
        if (y > largest) largest = y;
      }
      amax[static_cast<size_t>(r)] = largest;
    }
  });
  return amax;
}

/// The same for every column.
template <class In>
std::vector<float> column_amax(const typename In::Storage* x, int64_t rows, int64_t cols,
                               const ActivationArgs& activation) {
  auto amax = make_buffer<float>(cols);
  parallel_for(cols, rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = begin; c < end; ++c) {
        const float y = std::fabs(activation.value(In::load(x[r * cols + c])));
        if (y > amax[static_cast<size_t>(c)]) amax[static_cast<size_t>(c)] = y;
      }
    }
  });
  return amax;
}

/// Scales from the amax of each row of A: all of them, or one for the largest.
inline void write_scales(const std::vector<float>& amax, Scaling scaling, float* scale) {
  if (scaling == Scaling::kTensor) {
    scale[0] = scale_of_amax(amax.empty() ? 0.0f : *std::max_element(amax.begin(), amax.end()));
  } else {
    std::transform(amax.begin(), amax.end(), scale, scale_of_amax);
  }
}

}  // namespace sparse24
