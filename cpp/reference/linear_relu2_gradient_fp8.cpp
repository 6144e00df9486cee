/// @file
/// The plain form of linear_relu2_gradient_fp8.
#include "sparse24/linear_relu2_gradient_fp8.h"

#include "reference/gradient_fp8.h"

namespace sparse24::cpu {
namespace {

void transpose(const LinearRelu2GradientFp8Args& args, const void* from, void* to) {
  const int64_t ld = args.ld_transposed();
  for (int64_t f = 0; f < args.features; ++f) {
    for (int64_t t = 0; t < ld; ++t) {
      static_cast<uint8_t*>(to)[f * ld + t] =
          t < args.tokens ? static_cast<const uint8_t*>(from)[t * args.features + f] : 0;
    }
  }
}

}  // namespace

void linear_relu2_gradient_fp8(const LinearRelu2GradientFp8Args& args) {
  differentiate_fp8(args, multiply_fp8(args));
  transpose(args, args.y, args.y_transposed);
  transpose(args, args.dh, args.dh_transposed);
}

}  // namespace sparse24::cpu
