/// @file
/// The slow, plain form of quantize_fp8.
#include "sparse24/quantize.h"

#include <algorithm>

#include "core/parallel.h"
#include "reference/activate.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

template <class In>
void quantize_as(const QuantizeArgs& args) {
  const auto* x = static_cast<const typename In::Storage*>(args.x);
  auto* q = static_cast<uint8_t*>(args.q);

  const float* scale = args.given_scale;
  if (scale == nullptr) {
    write_scales(row_amax<In>(x, args.rows, args.cols, Activation::kNone), args.scaling, args.computed_scale);
    scale = args.computed_scale;
  }

  parallel_for(args.rows, args.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float row_scale = usable_scale(scale[args.scaling == Scaling::kRow ? r : 0]);
      const float inverse = 1.0f / row_scale;
      int64_t squares = 0;
      for (int64_t at = r * args.cols; at < (r + 1) * args.cols; ++at) {
        q[at] = float_to_e4m3(In::load(x[at]) * inverse);
        squares += int64_t{e4m3_units(q[at])} * e4m3_units(q[at]);
      }
      if (args.predicted) args.predicted[r] = predicted_scale(squares, row_scale, *args.factor);
    }
  });
}

}  // namespace

void usable_scales(const UsableScalesArgs& args) {
  std::transform(args.given, args.given + args.count, args.used, usable_scale);
}

void quantize_fp8(const QuantizeArgs& args) {
  visit_dtype(args.x_dtype, [&](auto in) { quantize_as<decltype(in)>(args); });
}

}  // namespace sparse24::cpu
