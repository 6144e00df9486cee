/// @file
/// The references of products with dense weights, for one that was 2:4: `kept` tells by 1 which entries it has, as
/// `dense_products` wants it. It multiplies with no others, so that what is pruned hides NaN and infinities of x.
#pragma once

#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"
#include "sparse24/linear_gradient_fp8.h"

namespace sparse24::cpu {

/// `kept` is [in, out].
void linear_compress(const LinearCompressArgs& args, const uint8_t* kept);
/// `kept` is [in, features].
void linear_gradient(const LinearGradientArgs& args, const uint8_t* kept);
void linear_gradient_fp8(const LinearGradientFp8Args& args, const uint8_t* kept);

}  // namespace sparse24::cpu
