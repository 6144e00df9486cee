/// @file
/// The plain form of relu2_mlp_few: the first product, then mm_active.
#include "sparse24/relu2_mlp_few.h"

#include <vector>

#include "reference/numeric.h"
#include "reference/product.h"

namespace sparse24::cpu {
namespace {

template <class X, class W>
void multiply(const LinearFewArgs& args) {
  const std::vector<float> b = widen<W>(args.w, args.in, args.out, Major::kColumn, args.in);
  auto* y = static_cast<typename X::Storage*>(args.y);
  for_each_sum(args.tokens, args.out, args.in, dense_products<X>(args.x, args.in, b, args.out),
               [&](int64_t t, int64_t f_begin, int64_t f_end, const float* sums) {
                 for (int64_t f = f_begin; f < f_end; ++f) {
                   float sum = sums[f - f_begin];
                   if (args.scale_w != nullptr) sum *= scale_at(args.scale_w, args.scale_w_per_row, f);
                   if (args.bias != nullptr) sum += bias_at(args.bias, args.dtype, f);
                   const float h = X::load(X::round(sum));
                   const float kept = h <= args.threshold ? 0.0f : h;  // NaN is kept
                   y[t * args.out + f] = X::round(kept * kept);
                 }
               });
}

}  // namespace

void linear_few(const LinearFewArgs& args) {
  visit_dtype(args.dtype, [&](auto of_x) {
    visit_dtype(args.w_dtype, [&](auto of_w) { multiply<decltype(of_x), decltype(of_w)>(args); });
  });
}

void relu2_mlp_few(const Relu2MlpFewArgs& args) {
  linear_few(args.first);
  mm_active(args.second);
}

}  // namespace sparse24::cpu
