/// @file
/// The plain form of linear_gradient: the product, then the separate steps that the kernels fuse.
#include "sparse24/linear_gradient.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/buffer.h"
#include "reference/gradient.h"
#include "reference/groups.h"
#include "reference/kept.h"
#include "reference/numeric.h"
#include "sparse24/compress.h"

namespace sparse24::cpu {
namespace {

using Bytes = std::vector<unsigned char>;

template <class H>
typename H::Storage* codes(Bytes& bytes) {
  return reinterpret_cast<typename H::Storage*>(bytes.data());
}

/// Returns the token in a row of a matrix that is compressed along tokens.
int64_t token_of(const LinearGradientArgs& args, int64_t row) { return interleaved_token(row, args.quarter()); }

/// Computes dy [tokens, features] with tokens in their own order.
template <class In, class H>
void multiply(const LinearGradientArgs& args, typename H::Storage* dy, const uint8_t* kept) {
  const auto store = [&](int64_t r, int64_t f_begin, int64_t f_end, const float* sums) {
    auto* row = dy + r * args.features;
    for (int64_t f = f_begin; f < f_end; ++f) row[f] = H::round(sums[f - f_begin]);
  };
  for_each_gradient<In>(args, store, kept);
}

/// Copies all tokens of the dense features out of a dense matrix.
template <class H>
void store_hot(const LinearGradientArgs& args, const typename H::Storage* dense, typename H::Storage* out) {
  int64_t highest = -1;
  for (int64_t i = 0; i < args.hot_count; ++i) {
    const int64_t feature = args.hot[i];
    const bool valid = highest < feature && feature < args.features;
    for (int64_t t = 0; t < args.tokens; ++t) {
      out[i * args.tokens + t] = valid ? dense[t * args.features + feature] : H::round(std::nanf(""));
    }
    highest = std::max(highest, feature);
  }
}

/// Compresses the values of a matrix with groups of features once more with groups of tokens, and stores its dense
/// features. The dense matrix itself goes to `dense`.
template <class H>
void turn(const LinearGradientArgs& args, const void* values, const TokenCompressed& out, void* hot, Bytes& dense) {
  const int64_t t = args.tokens, f = args.features;
  const DType dtype = args.hidden_dtype;
  decompress({values, args.meta, dtype, t, f, Dim::kFeatures, dense.data()});
  store_hot<H>(args, codes<H>(dense), static_cast<typename H::Storage*>(hot));
  auto ordered = make_buffer<unsigned char>(static_cast<int64_t>(dense.size()));
  const int64_t bytes = f * size_of(dtype);
  for (int64_t r = 0; r < t; ++r)
    std::memcpy(ordered.data() + r * bytes, dense.data() + token_of(args, r) * bytes, bytes);
  compress({ordered.data(), dtype, t, f, Dim::kTokens, Activation::kNone, dtype, out.values, out.meta});
}

/// Returns the kept values of y where those of its root are given.
template <class H>
Bytes squares(const LinearGradientArgs& args) {
  const auto* roots = static_cast<const typename H::Storage*>(args.y);
  auto out = make_buffer<unsigned char>(args.tokens * args.features / 2 * size_of(args.hidden_dtype));
  std::transform(roots, roots + args.tokens * args.features / 2, codes<H>(out), [](auto code) {
    const float root = H::load(code);
    return H::round(root * root);
  });
  return out;
}

template <class H>
void finish(const LinearGradientArgs& args, Bytes& dy) {
  const auto* y = static_cast<const typename H::Storage*>(args.y);
  auto* dh = static_cast<typename H::Storage*>(args.dh);
  compress_like({dy.data(), args.hidden_dtype, args.tokens, args.features, Dim::kFeatures, args.meta, dh});
  for (int64_t i = 0; i < args.tokens * args.features / 2; ++i) dh[i] = times_root<H>(dh[i], y[i], args.roots);
  if (!args.y_tokens.values) return;
  Bytes& dense = dy;  // no longer needed
  turn<H>(args, dh, args.dh_tokens, args.dh_hot, dense);
  const Bytes of_roots = args.roots ? squares<H>(args) : Bytes{};
  turn<H>(args, args.roots ? of_roots.data() : args.y, args.y_tokens, args.y_hot, dense);
  if (!args.counts) return;
  for (int64_t t = 0; t < args.tokens; ++t) {
    for (int64_t f = 0; f < args.features; ++f) {
      args.counts[f] += H::load(codes<H>(dense)[t * args.features + f]) != 0.0f;
    }
  }
}

}  // namespace

void linear_gradient(const LinearGradientArgs& args) { linear_gradient(args, nullptr); }

void linear_gradient(const LinearGradientArgs& given, const uint8_t* kept) {
  // The separate steps read metadata in the layout of their values.
  const auto pattern = [&](DType dtype) { return Operand::of(given.tokens, given.features, dtype, Dim::kFeatures); };
  const Operand own = pattern(given.hidden_dtype);
  auto meta = make_buffer<unsigned char>(own.meta_bytes());
  convert_meta(given.meta, pattern(given.meta_dtype), meta.data(), own);
  LinearGradientArgs args = given;
  args.meta = meta.data();

  auto dy = make_buffer<unsigned char>(args.tokens * args.features * size_of(args.hidden_dtype));
  visit_dtype(args.hidden_dtype, [&](auto type) {
    using H = decltype(type);
    visit_dtype(args.dtype, [&](auto in) { multiply<decltype(in), H>(args, codes<H>(dy), kept); });
    finish<H>(args, dy);
  });
}

}  // namespace sparse24::cpu
