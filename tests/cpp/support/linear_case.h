/// @file
/// Problems for linear_relu2 and linear_compress, and their results on the CPU with poisoned outputs.
#pragma once

#include <cmath>
#include <iterator>
#include <optional>
#include <vector>

#include "sparse24/linear.h"
#include "support/array.h"
#include "support/compressed.h"

namespace sparse24::test {

/// Where the scale of y comes from. kUnusual: one per token, of which some cannot be divided by.
enum class OutScale { kNone, kOne, kPerToken, kUnusual };

/// x [tokens, in], w [out, in] and everything that is optional.
struct LinearCase {
  int64_t tokens, in, out;
  Array x, w;
  DType hidden_dtype;
  DType y_dtype;
  std::vector<float> scale_x = {}, scale_w = {}, scale_y = {};  ///< empty: none; one element, or one per row
  std::optional<Array> bias = {};
  ActivationArgs activation = Activation::kRelu2;

  LinearCase(int64_t t, int64_t d, int64_t f, Array x_, Array w_)
      : tokens(t),
        in(d),
        out(f),
        x(std::move(x_)),
        w(std::move(w_)),
        hidden_dtype(x.dtype() == DType::kFloat8E4M3 ? DType::kBFloat16 : x.dtype()),
        y_dtype(hidden_dtype) {}

  /// Small integers: products and sums are exact in fp32 whatever their order.
  static LinearCase integers(DType dtype, int64_t t, int64_t d, int64_t f, uint64_t seed) {
    return {t, d, f, random_integers(dtype, t * d, 2, seed), random_integers(dtype, f * d, 2, seed + 1)};
  }
  /// Powers of two for every row and a bias: everything stays exact.
  void add_scales_and_bias(uint64_t seed) {
    for (int64_t i = 0; i < tokens; ++i) scale_x.push_back(std::ldexp(1.0f, static_cast<int>(i % 4) - 2));
    for (int64_t i = 0; i < out; ++i) scale_w.push_back(std::ldexp(1.0f, static_cast<int>(i % 3) - 1));
    bias = random_integers(hidden_dtype, out, 9, seed);
  }
  /// Makes y fp8, by scales so small that some of it saturates.
  void scale_output(OutScale kind) {
    if (kind == OutScale::kNone) return;
    y_dtype = DType::kFloat8E4M3;
    for (int64_t i = 0; i < (kind == OutScale::kOne ? 1 : tokens); ++i) {
      scale_y.push_back(0.37f * static_cast<float>(1 + i % 13));
    }
    if (kind != OutScale::kUnusual) return;
    constexpr float kUnusual[] = {0.0f, -0.0f, 1e-39f, -1e-39f, -0.37f, INFINITY, NAN};
    for (size_t i = 1; i < scale_y.size(); i += 2) scale_y[i] = kUnusual[i / 2 % std::size(kUnusual)];
  }

  /// Arguments on host memory.
  LinearArgs args() const {
    LinearArgs a{};
    a.tokens = tokens;
    a.in = in;
    a.out = out;
    a.x = x.data();
    a.w = w.data();
    a.dtype = x.dtype();
    a.hidden_dtype = hidden_dtype;
    a.y_dtype = y_dtype;
    a.scale_x = scale_x.empty() ? nullptr : scale_x.data();
    a.scale_x_per_row = scale_x.size() > 1;
    a.scale_w = scale_w.empty() ? nullptr : scale_w.data();
    a.scale_w_per_row = scale_w.size() > 1;
    a.bias = bias ? bias->data() : nullptr;
    a.scale_y = scale_y.empty() ? nullptr : scale_y.data();
    a.scale_y_per_row = scale_y.size() > 1;
    a.activation = activation;
    return a;
  }
};

/// What both functions report besides y.
struct LinearStatistics {
  float amax = 0;
  int32_t saturated = 0;
};

struct DenseResult : LinearStatistics {
  explicit DenseResult(const LinearCase& c) : y(c.y_dtype, c.tokens * c.out) {}
  Array y;
};

struct CompressedResult : LinearStatistics {
  CompressedResult(const LinearCase& c, DType meta_dtype)
      : a(Operand::of(c.tokens, c.out, meta_dtype, Dim::kFeatures)),
        values(c.y_dtype, c.tokens * c.out / 2),
        meta(a.meta_bytes(), 0xFF) {}
  Operand a;
  Array values;
  std::vector<uint8_t> meta;
};

inline DenseResult cpu_linear_relu2(const LinearCase& c) {
  DenseResult out(c);
  LinearRelu2Args args{c.args(), out.y.data()};
  args.linear.amax = &out.amax;
  args.linear.saturated = &out.saturated;
  cpu::linear_relu2(args);
  return out;
}

inline CompressedResult cpu_linear_compress(const LinearCase& c, DType meta_dtype) {
  CompressedResult out(c, meta_dtype);
  LinearCompressArgs args{c.args(), out.values.data(), out.meta.data(), meta_dtype};
  args.linear.amax = &out.amax;
  args.linear.saturated = &out.saturated;
  cpu::linear_compress(args);
  return out;
}

}  // namespace sparse24::test
