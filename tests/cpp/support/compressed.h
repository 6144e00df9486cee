/// @file
/// Runs of the CPU functions with poisoned outputs, for tests.
#pragma once

#include <optional>
#include <random>
#include <vector>

#include "sparse24/compress.h"
#include "sparse24/mm.h"
#include "sparse24/quantize.h"
#include "support/array.h"

namespace sparse24::test {

/// What compress makes of X [rows, cols].
struct Compressed {
  Operand a;
  Array values;
  std::vector<uint8_t> meta;
  std::vector<float> scale;  ///< empty unless computed

  Compressed(int64_t rows, int64_t cols, DType values_dtype, Dim dim)
      : a(Operand::of(rows, cols, values_dtype, dim)),
        values(values_dtype, a.values_rows() * a.values_cols()),
        meta(a.meta_bytes(), 0xFF) {}

  /// Indices of the two kept elements of group g of a row of A.
  std::pair<int, int> kept(int64_t row, int64_t g) const {
    const int nibble = meta[a.meta_byte(row, g)] >> Operand::meta_shift(g) & 0xF;
    return {nibble & 3, nibble >> 2};
  }
  /// Metadata that compress may never make.
  void keep(int64_t row, int64_t g, std::pair<int, int> which) {
    uint8_t& byte = meta[a.meta_byte(row, g)];
    const int shift = Operand::meta_shift(g);
    byte = static_cast<uint8_t>((byte & ~(0xF << shift)) | (which.first | which.second << 2) << shift);
  }
  /// Any pair in every group: equal positions and descending ones too.
  void keep_any(uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int64_t row = 0; row < a.m; ++row) {
      for (int64_t g = 0; g < a.k_values / 4; ++g) {
        const auto nibble = static_cast<int>(random() % 16);
        keep(row, g, {nibble & 3, nibble >> 2});
      }
    }
  }
  /// A [m, k_values], zeros where nothing was kept.
  std::vector<double> dense() const {
    std::vector<double> out(a.m * a.k_values, 0);
    for (int64_t row = 0; row < a.m; ++row) {
      for (int64_t g = 0; g < a.k_values / 4; ++g) {
        const auto [i0, i1] = kept(row, g);
        out[row * a.k_values + 4 * g + i0] = values[a.value_index(row, 2 * g)];
        out[row * a.k_values + 4 * g + i1] = values[a.value_index(row, 2 * g + 1)];
      }
    }
    return out;
  }
};

/// How compress is called, X apart.
struct How {
  Dim dim = Dim::kFeatures;
  ActivationArgs activation = Activation::kNone;
  Scaling scaling = Scaling::kRow;
  std::vector<float> given_scale = {};
};

inline Compressed cpu_compress(const Array& x, int64_t rows, int64_t cols, DType values_dtype, const How& how = {}) {
  Compressed out(rows, cols, values_dtype, how.dim);
  CompressArgs args{x.data(),     x.dtype(),         rows,           cols, how.dim, how.activation,
                    values_dtype, out.values.data(), out.meta.data()};
  args.scaling = how.scaling;
  if (values_dtype == DType::kFloat8E4M3) {
    if (how.given_scale.empty()) {
      out.scale.assign(how.scaling == Scaling::kRow ? out.a.m : 1, NAN);
      args.computed_scale = out.scale.data();
    } else {
      args.given_scale = how.given_scale.data();
    }
  }
  cpu::compress(args);
  return out;
}

/// The optional parts of one mm and the layout of its operands.
struct Product {
  explicit Product(int64_t columns) : n(columns) {}

  int64_t n;
  Major b_major = Major::kRow;
  int64_t ldb = 0;  ///< 0: packed
  DType d_dtype = DType::kFloat32;
  Major d_major = Major::kRow;
  std::vector<float> scale_a = {}, scale_b = {};  ///< empty: none; one element, or one per row or column
  std::optional<Array> bias = {};
  bool interleaved = false;  ///< A is of interleaved tokens, B is not

  int64_t ld(int64_t k) const { return ldb ? ldb : b_major == Major::kRow ? n : k; }
};

/// Arguments of mm on host memory; `d` has m * n elements.
inline MmArgs mm_args(const Compressed& a, const Array& b, const Product& p, Array& d) {
  MmArgs args{a.a,       p.n,         a.values.data(), a.meta.data(), b.data(),
              p.b_major, p.ld(a.a.k), d.data(),        p.d_dtype,     p.d_major};
  if (!p.scale_a.empty()) args.scale_a = p.scale_a.data();
  args.scale_a_per_row = p.scale_a.size() > 1;
  if (!p.scale_b.empty()) args.scale_b = p.scale_b.data();
  args.scale_b_per_column = p.scale_b.size() > 1;
  if (p.bias) {
    args.bias = p.bias->data();
    args.bias_dtype = p.bias->dtype();
  }
  args.b_interleaved = p.interleaved;
  return args;
}

/// The rows of b [k, n], row-major and packed, in the order of interleaved tokens.
inline Array interleave(const Array& b, int64_t k, int64_t n) {
  Array out(b.dtype(), k * n);
  for (int64_t i = 0; i < k * n; ++i) out.set_code(i, b.code(interleaved_token(i / n, k / 4) * n + i % n));
  return out;
}

inline Array cpu_mm(const Compressed& a, const Array& b, const Product& p) {
  Array d(p.d_dtype, a.a.m * p.n);
  cpu::mm(mm_args(a, b, p, d));
  return d;
}

}  // namespace sparse24::test
