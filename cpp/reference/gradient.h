/// @file
/// What the references of linear_gradient and linear_relu2_gradient share: grad @ w, and its product with the root.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/numeric.h"
#include "reference/product.h"

namespace sparse24 {

/// grad @ w in fp32, row by row in blocks of features: `store(row, f_begin, f_end, sums)`, where `sums` begins at
/// f_begin. Threads share no row. `kept` as in `dense_products`.
template <class In, class Args, class Store>
void for_each_gradient(const Args& args, const Store& store, const uint8_t* kept = nullptr) {
  const std::vector<float> w = widen<In>(args.w, args.in, args.features, Major::kRow, args.features);
  for_each_sum(args.tokens, args.features, args.in, dense_products<In>(args.grad, args.ld_grad, w, args.features, kept),
               store);
}

/// Returns dy * (2 sqrt(y)), rounded once. With `roots` y is the root already.
template <class H>
typename H::Storage times_root(typename H::Storage dy, typename H::Storage y, bool roots) {
  const float value = H::load(y);
  return H::round(H::load(dy) * (2.0f * (roots ? value : std::sqrt(value))));
}

}  // namespace sparse24
