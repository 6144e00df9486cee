/// @file
/// The plain form of linear_relu2_gradient: the product, rounded, then its product with the root.
#include "sparse24/linear_relu2_gradient.h"

#include "reference/gradient.h"
#include "reference/numeric.h"

namespace sparse24::cpu {

void linear_relu2_gradient(const LinearRelu2GradientArgs& args) {
  visit_dtype(args.hidden_dtype, [&](auto type) {
    using H = decltype(type);
    const auto* y = static_cast<const typename H::Storage*>(args.y);
    auto* dh = static_cast<typename H::Storage*>(args.dh);
    visit_dtype(args.dtype, [&](auto in) {
      for_each_gradient<decltype(in)>(args, [&](int64_t t, int64_t f_begin, int64_t f_end, const float* sums) {
        for (int64_t f = f_begin; f < f_end; ++f) {
          const int64_t at = t * args.features + f;
          dh[at] = times_root<H>(H::round(sums[f - f_begin]), y[at], args.roots);
        }
      });
    });
  });
}

}  // namespace sparse24::cpu
