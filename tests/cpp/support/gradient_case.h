/// @file
/// Problems for linear_gradient, and their results on the CPU with poisoned outputs.
#pragma once

#include <vector>

#include "sparse24/linear_gradient.h"
#include "support/array.h"
#include "support/compressed.h"

namespace sparse24::test {

/// grad [tokens, in], w [in, features], and the activation y, or its roots, as it was kept.
struct GradientCase {
  int64_t tokens, in, features;
  Array grad, w;
  Compressed y;
  std::vector<uint8_t> meta;  ///< of y, in the layout of meta_dtype
  DType meta_dtype;
  bool interleaved = false;
  std::vector<int64_t> hot = {};  ///< features of which all tokens are wanted
  bool roots;                     ///< y holds relu(h)

  /// y = relu(h)^2 of h [tokens, features], or kRelu of it.
  GradientCase(int64_t t, int64_t d, int64_t f, Array grad_, Array w_, const Array& h,
               Activation activation = Activation::kRelu2)
      : tokens(t),
        in(d),
        features(f),
        grad(std::move(grad_)),
        w(std::move(w_)),
        y(cpu_compress(h, t, f, h.dtype(), {Dim::kFeatures, activation})),
        meta(y.meta),
        meta_dtype(h.dtype()),
        roots(activation == Activation::kRelu) {}

  /// Small integers: products and sums are exact in fp32 whatever their order.
  static GradientCase integers(DType dtype, int64_t t, int64_t d, int64_t f, uint64_t seed, bool specials = false,
                               Activation activation = Activation::kRelu2) {
    return {t,
            d,
            f,
            random_integers(dtype, t * d, 2, seed),
            random_integers(dtype, f * d, 2, seed + 1),
            random_activations(dtype, t * f, seed + 2, specials),
            activation};
  }
  DType hidden() const { return y.values.dtype(); }

  /// The same problem with the metadata that float8 values would have.
  GradientCase with_fp8_meta() && {
    meta_dtype = DType::kFloat8E4M3;
    const Operand a = Operand::of(tokens, features, meta_dtype, Dim::kFeatures);
    meta.assign(a.meta_bytes(), kMetaPaddingByte);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < features / 4; ++g) {
        const auto [i0, i1] = y.kept(t, g);
        uint8_t& byte = meta[a.meta_byte(t, g)];
        const int shift = Operand::meta_shift(g);
        byte = static_cast<uint8_t>((byte & ~(0xF << shift)) | (i0 | i1 << 2) << shift);
      }
    }
    return std::move(*this);
  }
};

/// LinearGradientArgs::grad_tail, its rows `c.in` long; empty where there is none.
inline Array grad_tail(const GradientCase& c) {
  if (c.tokens % kGradTokenMultiple == 0) return Array(c.grad.dtype(), 0);
  const Array ordered = c.interleaved ? interleave(c.grad, c.tokens, c.in) : c.grad;
  const int64_t first = first_of_tail(c.tokens, kGradTailTile) * c.in;
  Array out(c.grad.dtype(), std::vector<double>(round_up(c.tokens * c.in - first, kGradTokenMultiple * c.in), 0));
  for (int64_t i = first; i < ordered.size(); ++i) out.set_code(i - first, ordered.code(i));
  return out;
}

/// Everything that linear_gradient writes.
struct GradientResult {
  explicit GradientResult(const GradientCase& c)
      : dh(c.hidden(), c.y.values.size()),
        y_tokens(c.tokens, c.features, c.hidden(), Dim::kTokens),
        dh_tokens(c.tokens, c.features, c.hidden(), Dim::kTokens),
        counts(c.features, 0),
        y_hot(c.hidden(), static_cast<int64_t>(c.hot.size()) * c.tokens),
        dh_hot(y_hot) {}

  Array dh;
  Compressed y_tokens, dh_tokens;
  std::vector<int32_t> counts;
  Array y_hot, dh_hot;
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
          c.meta.data(),
          c.meta_dtype,
          out.dh.data(),
          {out.y_tokens.values.data(), out.y_tokens.meta.data()},
          {out.dh_tokens.values.data(), out.dh_tokens.meta.data()},
          out.counts.data(),
          c.interleaved,
          /*grad_tail=*/nullptr,
          c.hot.data(),
          static_cast<int64_t>(c.hot.size()),
          out.y_hot.data(),
          out.dh_hot.data(),
          /*hot_slots=*/nullptr,
          c.roots};
}

inline GradientResult cpu_linear_gradient(const GradientCase& c) {
  GradientResult out(c);
  cpu::linear_gradient(gradient_args(c, out));
  return out;
}

}  // namespace sparse24::test
