/// @file
/// Accumulators as a function of their place, and the scales that epilogues apply to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace sparse24::emulate {

/// Which scales and biases there are.
enum class Scales {
  kNone,
  kOne,   ///< one scale for all rows, one for all columns, and a bias
  kEach,  ///< one for each row and each column, and a bias
};

/// Powers of two from 1/4 on, one for each of `count` rows or columns, or one for all. The period is the caller's: none
/// that divides 8, or rows whose results lie in one thread would be alike.
inline std::vector<float> scales(Scales given, int count, int period) {
  std::vector<float> out;
  for (int i = 0; i < (given == Scales::kNone ? 0 : given == Scales::kOne ? 1 : count); ++i) {
    out.push_back(std::ldexp(1.f, i % period - 2));
  }
  return out;
}

/// A [rows, cols] result, and beyond it what must reach nothing: anything below its rows, and beside its columns what
/// factors that are read as zeros make of a row, zeros or NaN.
///
/// Numbers have 13 bits of different weights, zeros and ties among them: what the tests make of them, by scales that
/// are powers of two and small integers as biases, is exact before it is rounded.
class Sums {
 public:
  Sums(int rows, int cols, bool specials = false) : rows_(rows), cols_(cols), specials_(specials) {}

  float operator()(int m, int n, int batch = 0) const {
    if (m >= rows_) return (m + n) % 3 == 0 ? NAN : 5000.f;
    if (n >= cols_) return m % 3 == 0 ? NAN : 0.f;
    const uint32_t r = hash(static_cast<uint32_t>((batch * rows_ + m) * cols_ + n));
    if (specials_ && r % 61 == 0) return NAN;
    if (specials_ && r % 61 == 1) return r >> 16 & 1 ? INFINITY : -INFINITY;
    if (r >> 8 & 1) return static_cast<float>(static_cast<int>(r >> 9) % 4 - 1);
    return std::ldexp(static_cast<float>(static_cast<int>(r >> 12) % 8191 - 4095), -3 - static_cast<int>(r >> 9) % 8);
  }
  std::vector<float> row(int m, int batch = 0) const {
    std::vector<float> out;
    for (int n = 0; n < cols_; ++n) out.push_back((*this)(m, n, batch));
    return out;
  }

 private:
  static uint32_t hash(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
  }

  int rows_, cols_;
  bool specials_;
};

}  // namespace sparse24::emulate
