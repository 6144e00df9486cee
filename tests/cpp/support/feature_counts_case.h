/// @file
/// 2:4 activations for the tests of feature_counts, and their counts on the CPU.
#pragma once

#include <vector>

#include "sparse24/feature_counts.h"
#include "support/compressed.h"

namespace sparse24::test {

/// X [tokens, features] with zeros of both signs, NaN and infinities; `meta_dtype`: of kFloat8E4M3 the metadata has the
/// layout of float8 values.
struct CountsCase {
  Compressed x;
  std::vector<uint8_t> meta;
  DType meta_dtype;

  CountsCase(DType dtype, bool fp8_meta, int64_t tokens, int64_t features)
      : x(compressed(dtype, tokens, features)),
        meta(fp8_meta ? cpu_compress(numbers(dtype, tokens, features), tokens, features, DType::kFloat8E4M3).meta
                      : x.meta),
        meta_dtype(fp8_meta ? DType::kFloat8E4M3 : dtype) {}

  static Array numbers(DType dtype, int64_t tokens, int64_t features) {
    const bool fp8 = dtype == DType::kFloat8E4M3;
    return random_activations(fp8 ? DType::kBFloat16 : dtype, tokens * features, static_cast<uint64_t>(tokens));
  }
  static Compressed compressed(DType dtype, int64_t tokens, int64_t features) {
    return cpu_compress(numbers(dtype, tokens, features), tokens, features, dtype);
  }

  FeatureCountsArgs args(const void* values, const uint8_t* own_meta, int64_t samples, int32_t* counts) const {
    return {x.a, values, own_meta, meta_dtype, samples, counts};
  }
};

inline std::vector<int32_t> cpu_feature_counts(const CountsCase& c, int64_t samples) {
  std::vector<int32_t> counts(static_cast<size_t>(c.x.a.k), -1);
  cpu::feature_counts(c.args(c.x.values.data(), c.meta.data(), samples, counts.data()));
  return counts;
}

}  // namespace sparse24::test
