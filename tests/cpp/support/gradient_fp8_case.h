/// @file
/// Problems for linear_gradient_fp8, and their results on the CPU with poisoned outputs.
#pragma once

#include <vector>

#include "sparse24/linear_gradient_fp8.h"
#include "support/array.h"
#include "support/compressed.h"

namespace sparse24::test {

/// grad [tokens, in], w [features, in], and the activation y as it was kept: codes.
struct GradientFp8Case {
  int64_t tokens, in, features;
  bool interleaved = false;
  std::vector<int64_t> hot = {};  ///< features of which all tokens are wanted
  /// Not powers of two, and some of dh saturates.
  std::vector<float> scales = {0.75f, 1.25f, 0.3f, 0.02f};  ///< of grad, w, y, dh
  Array grad, w;
  Compressed y;

  /// Small integers: products and sums are exact in fp32 whatever their order. specials: NaN among them, and in y.
  GradientFp8Case(int64_t t, int64_t d, int64_t f, uint64_t seed, bool specials = false)
      : tokens(t),
        in(d),
        features(f),
        grad(random_integers(DType::kFloat8E4M3, t * d, 3, seed)),
        w(random_integers(DType::kFloat8E4M3, f * d, 3, seed + 1)),
        y(cpu_compress(random_activations(DType::kBFloat16, t * f, seed + 2, specials), t, f, DType::kFloat8E4M3,
                       {Dim::kFeatures, Activation::kRelu2, Scaling::kTensor, {0.3f}})) {
    if (!specials) return;
    for (int64_t i = 7; i < grad.size(); i += 293) grad.set(i, NAN);
    for (int64_t i = 5; i < w.size(); i += 631) w.set(i, NAN);
  }

  float dy(int64_t token, int64_t feature) const {
    double sum = 0;
    for (int64_t i = 0; i < in; ++i) sum += grad[token * in + i] * w[feature * in + i];
    return static_cast<float>(sum);
  }
};

/// LinearGradientFp8Args::grad_tail; empty where there is none.
inline Array grad_tail(const GradientFp8Case& c) {
  if (c.tokens % kGradTokenMultiple == 0) return Array(c.grad.dtype(), 0);
  const Array ordered = c.interleaved ? interleave(c.grad, c.tokens, c.in) : c.grad;
  const int64_t first = first_of_tail(c.tokens, kGradTailTile) * c.in;
  Array out(c.grad.dtype(), std::vector<double>(round_up(c.tokens * c.in - first, kGradTokenMultiple * c.in), 0));
  for (int64_t i = first; i < ordered.size(); ++i) out.set_code(i - first, ordered.code(i));
  return out;
}

/// Everything that linear_gradient_fp8 writes.
struct GradientFp8Result {
  explicit GradientFp8Result(const GradientFp8Case& c)
      : dh(DType::kFloat8E4M3, c.y.values.size()),
        y_tokens(c.tokens, c.features, DType::kFloat8E4M3, Dim::kTokens),
        dh_tokens(y_tokens),
        y_hot(DType::kFloat8E4M3, static_cast<int64_t>(c.hot.size()) * y_tokens.a.k_values),
        dh_hot(y_hot) {}

  Array dh;
  Compressed y_tokens, dh_tokens;
  Array y_hot, dh_hot;
  float amax = 0;
  int32_t saturated = 0;
};

/// Arguments on host memory.
inline LinearGradientFp8Args gradient_fp8_args(const GradientFp8Case& c, GradientFp8Result& out) {
  return {c.tokens,
          c.in,
          c.features,
          c.grad.data(),
          c.in,
          c.w.data(),
          &c.scales[0],
          &c.scales[1],
          &c.scales[2],
          &c.scales[3],
          c.y.values.data(),
          c.y.meta.data(),
          out.dh.data(),
          {out.y_tokens.values.data(), out.y_tokens.meta.data()},
          {out.dh_tokens.values.data(), out.dh_tokens.meta.data()},
          c.interleaved,
          /*grad_tail=*/nullptr,
          c.hot.data(),
          static_cast<int64_t>(c.hot.size()),
          out.y_hot.data(),
          out.dh_hot.data(),
          /*hot_slots=*/nullptr,
          &out.amax,
          &out.saturated};
}

inline GradientFp8Result cpu_linear_gradient_fp8(const GradientFp8Case& c) {
  GradientFp8Result out(c);
  cpu::linear_gradient_fp8(gradient_fp8_args(c, out));
  return out;
}

}  // namespace sparse24::test
