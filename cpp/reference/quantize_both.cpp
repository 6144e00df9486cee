/// @file
/// The slow, plain form of quantize_fp8_both.
#include "sparse24/quantize_both.h"

#include <algorithm>

#include "core/parallel.h"
#include "reference/activate.h"
#include "reference/numeric.h"

namespace sparse24::cpu {
namespace {

template <class In>
void quantize_as(const QuantizeBothArgs& args) {
  const auto* x = static_cast<const typename In::Storage*>(args.x);
  auto *q = static_cast<uint8_t*>(args.q), *qt = static_cast<uint8_t*>(args.qt);
  const auto amax = row_amax<In>(x, args.rows, args.cols, Activation::kNone);
  if (!amax.empty()) *args.amax = *std::max_element(amax.begin(), amax.end());
  *args.scale = args.given_scale ? usable_scale(*args.given_scale) : scale_of_amax(*args.amax);
  const float inverse = 1.0f / *args.scale;
  const int64_t ld = args.ld_qt();
  parallel_for(ld, args.cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = interleaved_token(r, args.quarter());
      for (int64_t c = 0; c < args.cols; ++c) {
        const uint8_t code = r < args.rows ? float_to_e4m3(In::load(x[row * args.cols + c]) * inverse) : 0;
        if (r < args.rows) q[row * args.cols + c] = code;
        qt[c * ld + r] = code;
      }
    }
  });
}

}  // namespace

void quantize_fp8_both(const QuantizeBothArgs& args) {
  visit_dtype(args.x_dtype, [&](auto in) { quantize_as<decltype(in)>(args); });
}

}  // namespace sparse24::cpu
