/// @file
/// Problems for linear_gradient, and their results on the CPU with poisoned outputs.
#pragma once

#include <vector>

#include "array.h"
#include "compressed.h"
#include "sparse24/linear_gradient.h"

namespace sparse24::test {

/// grad [tokens, in], w [in, features], and the activation y as it was kept.
struct GradientCase {
  int64_t tokens, in, features;
  Array grad, w;
  Compressed y;
  bool interleaved = false;

  /// y = relu(h)^2 of h [tokens, features].
  GradientCase(int64_t t, int64_t d, int64_t f, Array grad_, Array w_, const Array& h)
      : tokens(t),
        in(d),
        features(f),
        grad(std::move(grad_)),
        w(std::move(w_)),
        y(cpu_compress(h, t, f, h.dtype(), {Dim::kFeatures, Activation::kRelu2})) {}

  /// Small integers: products and sums are exact in fp32 whatever their order.
  static GradientCase integers(DType dtype, int64_t t, int64_t d, int64_t f, uint64_t seed, bool specials = false) {
    return {t,
            d,
            f,
            random_integers(dtype, t * d, 2, seed),
            random_integers(dtype, f * d, 2, seed + 1),
            random_activations(dtype, t * f, seed + 2, specials)};
  }
  DType hidden() const { return y.values.dtype(); }
};

/// Everything that linear_gradient writes.
struct GradientResult {
  explicit GradientResult(const GradientCase& c)
      : dh(c.hidden(), c.y.values.size()),
        y_tokens(c.tokens, c.features, c.hidden(), Dim::kTokens),
        dh_tokens(c.tokens, c.features, c.hidden(), Dim::kTokens),
        counts(c.features, 0) {}

  Array dh;
  Compressed y_tokens, dh_tokens;
  std::vector<int32_t> counts;
};

/// Arguments on host memory.
inline LinearGradientArgs gradient_args(const GradientCase& c, GradientResult& out) {
  return {c.tokens,
          c.in,
          c.features,
          c.grad.data(),
          c.in,
          c.w.data(),
          c.grad.dtype(),
          c.hidden(),
          c.y.values.data(),
          c.y.meta.data(),
          out.dh.data(),
          {out.y_tokens.values.data(), out.y_tokens.meta.data()},
          {out.dh_tokens.values.data(), out.dh_tokens.meta.data()},
          out.counts.data(),
          c.interleaved};
}

inline GradientResult cpu_linear_gradient(const GradientCase& c) {
  GradientResult out(c);
  cpu::linear_gradient(gradient_args(c, out));
  return out;
}

}  // namespace sparse24::test
