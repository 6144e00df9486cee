/// @file
/// The plain form of relu2_mlp_dense: its steps.
#include "sparse24/relu2_mlp_dense.h"

#include "reference/numeric.h"
#include "reference/product.h"

namespace sparse24::cpu {
namespace {

template <class In, class Out>
void multiply(const LinearOutArgs& args) {
  const std::vector<float> b = widen<In>(args.w, args.in, args.out, Major::kColumn, args.in);
  auto* d = static_cast<typename Out::Storage*>(args.d);
  for_each_sum(args.tokens, args.out, args.in, dense_products<In>(args.y, args.in, b, args.out),
               [&](int64_t t, int64_t n_begin, int64_t n_end, const float* sums) {
                 const float given = scale_at(args.scale_y, args.scale_y_per_row, t);
                 const float scale_y = args.scale_y == nullptr ? given : usable_scale(given);
                 for (int64_t n = n_begin; n < n_end; ++n) {
                   float sum = scale_y * scale_at(args.scale_w, args.scale_w_per_row, n) * sums[n - n_begin];
                   if (args.bias != nullptr) sum += bias_at(args.bias, args.bias_dtype, n);
                   d[t * args.out + n] = Out::round(sum);
                 }
               });
}

}  // namespace

void linear_out(const LinearOutArgs& args) {
  visit_dtype(args.dtype, [&](auto in) {
    visit_dtype(args.d_dtype, [&](auto out) { multiply<decltype(in), decltype(out)>(args); });
  });
}

void relu2_mlp_dense(const Relu2MlpDenseArgs& args) {
  if (args.of_x.q != nullptr) quantize_fp8(args.of_x);
  linear_relu2(args.first);
  if (args.of_y.q != nullptr) quantize_fp8(args.of_y);
  linear_out(args.second);
}

}  // namespace sparse24::cpu
