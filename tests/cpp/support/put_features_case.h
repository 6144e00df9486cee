/// @file
/// Problems for put_features, and their results on the CPU.
#pragma once

#include <vector>

#include "sparse24/put_features.h"
#include "support/array.h"

namespace sparse24::test {

struct PutCase {
  int64_t rows, columns;
  bool by_columns;
  int64_t part_count;
  std::vector<int64_t> features;
  Array out, parts;

  /// Every `stride`-th feature, and integers, whose sums are exact.
  PutCase(DType dtype, int64_t r, int64_t c, bool columns_, int64_t count_of_parts, int64_t stride)
      : rows(r),
        columns(c),
        by_columns(columns_),
        part_count(count_of_parts),
        out(random_integers(dtype, r * c, 9, 1)),
        parts(dtype, 0) {
    for (int64_t f = stride - 1; f < (by_columns ? columns : rows); f += stride) features.push_back(f);
    const auto put = static_cast<int64_t>(features.size());
    parts = random_integers(dtype, part_count * put * (by_columns ? rows : columns), 9, 2);
  }

  PutFeaturesArgs args(void* to, const void* from, const int64_t* which) const {
    return {rows, columns, to, out.dtype(), by_columns, from, part_count, which, static_cast<int64_t>(features.size())};
  }
};

inline Array cpu_put_features(const PutCase& c) {
  Array out = c.out;
  cpu::put_features(c.args(out.data(), c.parts.data(), c.features.data()));
  return out;
}

}  // namespace sparse24::test
