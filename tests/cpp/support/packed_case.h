/// @file
/// Problems for linear_compress_packed: a LinearCase with its weight packed.
#pragma once

#include "sparse24/packed.h"
#include "support/compressed.h"
#include "support/linear_case.h"

namespace sparse24::test {

/// A case whose weight is pruned to two of four along its columns, of which it has a multiple of 16 (fp8: 32), and that
/// weight packed.
struct PackedCase {
  LinearCase linear;
  Compressed packed;

  explicit PackedCase(LinearCase c) : linear(std::move(c)), packed(compress_ordered(linear)) {
    // The reference multiplies what is left.
    for (int64_t m = 0; m < linear.out; ++m) {
      for (int64_t g = 0; g < linear.in / 4; ++g) {
        const auto [i0, i1] = packed.kept(m, g);
        for (int i = 0; i < 4; ++i) {
          if (i != i0 && i != i1) linear.w.set_code(packed_feature(m) * linear.in + 4 * g + i, 0);
        }
      }
    }
  }

  LinearCompressPackedArgs args(DType meta_dtype, void* values, uint8_t* meta) const {
    LinearCompressPackedArgs out{{linear.args(), values, meta, meta_dtype}, packed.meta.data()};
    out.compress.linear.w = packed.values.data();
    return out;
  }

 private:
  /// compress takes 16 bits, which hold the integers of fp8 too.
  static Compressed compress_ordered(const LinearCase& c) {
    const DType dtype = c.w.dtype();
    const bool fp8 = dtype == DType::kFloat8E4M3;
    Array ordered(fp8 ? DType::kBFloat16 : dtype, c.out * c.in);
    for (int64_t i = 0; i < ordered.size(); ++i) {
      const int64_t from = packed_feature(i / c.in) * c.in + i % c.in;
      fp8 ? ordered.set(i, c.w[from]) : ordered.set_code(i, c.w.code(from));
    }
    How how;
    how.given_scale = std::vector<float>(static_cast<size_t>(c.out), 1.0f);
    return cpu_compress(ordered, c.out, c.in, dtype, how);
  }
};

}  // namespace sparse24::test
