/// @file
/// What the references of linear_gradient_fp8 and linear_relu2_gradient_fp8 share: the product, and the derivative on
/// codes.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "reference/numeric.h"
#include "reference/product.h"
#include "sparse24/quantize.h"

namespace sparse24 {

/// Computes dy = grad @ w.T [tokens, features] in bfloat16, unscaled. `kept`: as `dense_products` wants it.
template <class Args>
std::vector<uint16_t> multiply_fp8(const Args& args, const uint8_t* kept = nullptr) {
  auto dy = make_buffer<uint16_t>(args.tokens * args.features);
  const std::vector<float> w = widen<E4M3>(args.w, args.in, args.features, Major::kColumn, args.in);
  for_each_sum(args.tokens, args.features, args.in,
               dense_products<E4M3>(args.grad, args.ld_grad, w, args.features, kept),
               [&](int64_t r, int64_t f_begin, int64_t f_end, const float* sums) {
                 for (int64_t f = f_begin; f < f_end; ++f) {
                   dy[static_cast<size_t>(r * args.features + f)] = float_to_bfloat16(sums[f - f_begin]);
                 }
               });
  return dy;
}

/// Writes the codes of dh for as many numbers as dy has, and their statistics.
template <class Args>
void differentiate_fp8(const Args& args, const std::vector<uint16_t>& dy) {
  const auto* y = static_cast<const uint8_t*>(args.y);
  auto* dh = static_cast<uint8_t*>(args.dh);
  const float to_dh = *args.scale_grad * *args.scale_w * std::sqrt(*args.scale_y);
  const float to_code = to_dh * (1.0f / usable_scale(*args.scale_dh));
  float largest = 0.0f;
  for (size_t i = 0; i < dy.size(); ++i) {
    const float product = bfloat16_to_float(dy[i]) * (2.0f * std::sqrt(e4m3_to_float(y[i])));
    const float scaled = product * to_code;
    dh[i] = float_to_e4m3(scaled);
    largest = std::fmax(largest, std::fabs(product));
    *args.saturated += std::fabs(scaled) > kLargestE4M3;
  }
  const float amax = largest * to_dh;
  if (amax > 0.0f) *args.amax = amax;  // NaN, as infinity times a scale of zero is, does not count
}

}  // namespace sparse24
