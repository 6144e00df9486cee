/// @file
/// The plain form of linear_gradient_fp8: the product, then the separate steps that the kernel fuses.
#include "sparse24/linear_gradient_fp8.h"

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "reference/gradient_fp8.h"
#include "reference/groups.h"
#include "reference/kept.h"
#include "reference/numeric.h"
#include "sparse24/compress.h"

namespace sparse24::cpu {
namespace {

constexpr DType kFp8 = DType::kFloat8E4M3;

/// Compresses codes with groups of features once more with groups of tokens, and stores their dense features.
void turn(const LinearGradientFp8Args& args, const void* values, const TokenCompressed& out, void* hot) {
  const int64_t t = args.tokens, f = args.features, ld_hot = args.ld_hot();
  auto dense = make_buffer<uint8_t>(t * f);
  decompress({values, args.meta, kFp8, t, f, Dim::kFeatures, dense.data()});
  auto codes = make_buffer<uint8_t>(t * f);
  auto ordered = make_buffer<uint16_t>(t * f);  // bfloat16 has every number of float8
  for (int64_t i = 0; i < t * f; ++i) {
    const auto at = static_cast<size_t>(i);
    codes[at] = dense[static_cast<size_t>(interleaved_token(i / f, args.quarter()) * f + i % f)];
    ordered[at] = float_to_bfloat16(e4m3_to_float(codes[at]));
  }
  const float one = 1.0f;
  CompressArgs along_tokens{ordered.data(), DType::kBFloat16, t,       f, Dim::kTokens, Activation::kNone,
                            kFp8,           out.values,       out.meta};
  along_tokens.scaling = Scaling::kTensor;
  along_tokens.given_scale = &one;
  compress(along_tokens);
  // Codes move as they are: a NaN has two of them, of which a conversion would make one.
  compress_like({codes.data(), kFp8, t, f, Dim::kTokens, out.meta, out.values});

  int64_t highest = -1;
  for (int64_t i = 0; i < args.hot_count; ++i) {
    const int64_t feature = args.hot[i];
    const bool valid = highest < feature && feature < f;
    auto* row = static_cast<uint8_t*>(hot) + i * ld_hot;
    for (int64_t r = 0; r < ld_hot; ++r) {
      const bool exists = r < t;
      row[r] = !exists  ? 0
               : !valid ? kNanE4M3
                        : dense[static_cast<size_t>(interleaved_token(r, args.quarter()) * f + feature)];
    }
    highest = std::max(highest, feature);
  }
}

}  // namespace

void linear_gradient_fp8(const LinearGradientFp8Args& args) { linear_gradient_fp8(args, nullptr); }

void linear_gradient_fp8(const LinearGradientFp8Args& args, const uint8_t* w_kept) {
  const std::vector<uint16_t> dy = multiply_fp8(args, w_kept);
  auto kept = make_buffer<uint16_t>(args.tokens * args.features / 2);
  // The separate step reads metadata in the layout of its values.
  const Operand own = Operand::of(args.tokens, args.features, DType::kBFloat16, Dim::kFeatures);
  auto meta = make_buffer<uint8_t>(own.meta_bytes());
  convert_meta(args.meta, Operand::of(args.tokens, args.features, kFp8, Dim::kFeatures), meta.data(), own);
  compress_like({dy.data(), DType::kBFloat16, args.tokens, args.features, Dim::kFeatures, meta.data(), kept.data()});
  differentiate_fp8(args, kept);
  turn(args, args.dh, args.dh_tokens, args.dh_hot);
  turn(args, args.y, args.y_tokens, args.y_hot);
}

}  // namespace sparse24::cpu
