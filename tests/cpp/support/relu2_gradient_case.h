/// @file
/// Problems for linear_relu2_gradient, and their results on the CPU with poisoned outputs.
#pragma once

#include "sparse24/linear_relu2_gradient.h"
#include "support/array.h"

namespace sparse24::test {

/// relu(h)^2, rounded once; NaN stays NaN.
inline Array squared_relu(const Array& h) {
  Array y(h.dtype(), h.size());
  for (int64_t i = 0; i < h.size(); ++i) y.set(i, h[i] > 0 || std::isnan(h[i]) ? h[i] * h[i] : 0);
  return y;
}

inline Array relu(const Array& h) {
  Array root = h;
  for (int64_t i = 0; i < h.size(); ++i) {
    if (!(h[i] > 0 || std::isnan(h[i]))) root.set(i, 0);
  }
  return root;
}

/// grad [tokens, in], w [in, features] and the dense activation y [tokens, features].
struct Relu2GradientCase {
  int64_t tokens, in, features;
  Array grad, w, y;
  bool roots = false;  ///< y is given as relu(h)

  /// Small integers: products and sums are exact in fp32 whatever their order. `specials`: NaN and infinities in y.
  static Relu2GradientCase integers(DType dtype, int64_t t, int64_t d, int64_t f, uint64_t seed,
                                    bool specials = false) {
    return {t,
            d,
            f,
            random_integers(dtype, t * d, 2, seed),
            random_integers(dtype, f * d, 2, seed + 1),
            squared_relu(random_activations(dtype, t * f, seed + 2, specials))};
  }
};

/// Arguments on host memory.
inline LinearRelu2GradientArgs relu2_gradient_args(const Relu2GradientCase& c, Array& dh) {
  return {c.tokens,       c.in,        c.features, c.grad.data(), c.in,   c.w.data(),
          c.grad.dtype(), c.y.dtype(), c.y.data(), dh.data(),     c.roots};
}

inline Array cpu_linear_relu2_gradient(const Relu2GradientCase& c) {
  Array dh(c.y.dtype(), c.y.size());
  cpu::linear_relu2_gradient(relu2_gradient_args(c, dh));
  return dh;
}

}  // namespace sparse24::test
