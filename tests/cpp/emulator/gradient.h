/// @file
/// Cases of the epilogues of linear_gradient on the host, whose rows are tokens or features: what they are given, and
/// every output against the CPU reference.
#pragma once

#include "emulator/epilogue.h"
// After it.
#include "emulator/sums.h"
#include "gemm/sm90/epilogues/gradient.cuh"
#include "support/gradient_case.h"

namespace sparse24::emulate {

using test::Array;
using test::Compressed;
using test::GradientCase;
using test::GradientResult;

/// dy [tokens, features] is given; grad and w, which the epilogue never sees, are empty.
struct DyCase {
  int tokens, features;
  DType dtype;
  bool fp8_meta;                               ///< y's metadata is in the layout of float8
  bool specials = false;                       ///< NaN and infinities, in dy and in y
  bool interleaved = false;                    ///< the rows of dy, as of what is compressed along tokens, are
  Activation activation = Activation::kRelu2;  ///< kRelu: the epilogue is given the roots of y
  bool hostile = false;                        ///< y's metadata has any nibbles

  Sums dy() const { return {tokens, features, specials}; }
  /// The pre-activation: y is zero where it is negative.
  Array h() const { return test::random_activations(dtype, int64_t{tokens} * features, 5, specials); }
  GradientCase problem() const {
    GradientCase c(tokens, 0, features, Array(DType::kFloat32, 0), Array(DType::kFloat32, 0), h(), activation);
    c.interleaved = interleaved;
    if (hostile) c.y.keep_any(9);
    c.meta = c.y.meta;
    return fp8_meta ? std::move(c).with_fp8_meta() : c;
  }
  int64_t token(int64_t row) const { return interleaved_token(row, interleaved ? tokens / 4 : 0); }
};
inline void PrintTo(const DyCase& c, std::ostream* out) {
  *out << name_of(c.dtype) << (c.fp8_meta ? ", fp8 metadata, " : " ") << c.tokens << " x " << c.features
       << (c.specials ? ", specials" : "") << (c.interleaved ? ", interleaved" : "") << (c.hostile ? ", hostile" : "")
       << (c.activation == Activation::kRelu ? ", roots" : "");
}

/// dh of the token in a row: grad = 1 and w = its dy, so that they reach dh unchanged, NaN included.
inline Array dh_of_row(const DyCase& c, const Compressed& y, const Array& h, int row) {
  Array grad(DType::kFloat32, std::vector<double>{1}), w(DType::kFloat32, c.features), own(c.dtype, c.features);
  std::memcpy(w.data(), c.dy().row(row).data(), w.bytes());
  std::memcpy(own.data(), static_cast<const char*>(h.data()) + c.token(row) * own.bytes(), own.bytes());
  GradientCase token(1, 1, c.features, std::move(grad), std::move(w), own, c.activation);
  for (int64_t g = 0; g < c.features / 4; ++g) token.y.keep(0, g, y.kept(c.token(row), g));
  token.meta = token.y.meta;
  return test::cpu_linear_gradient(token).dh;
}

/// The dense matrix of values with groups of features, tokens in the order of the rows.
inline Array decompressed(const DyCase& d, const GradientCase& c, const Array& values) {
  Array dense(values.dtype(), c.tokens * c.features), rows = dense;
  cpu::decompress({values.data(), c.y.meta.data(), values.dtype(), c.tokens, c.features, Dim::kFeatures, dense.data()});
  for (int64_t i = 0; i < rows.size(); ++i) {
    rows.set_code(i, dense.code(d.token(i / c.features) * c.features + i % c.features));
  }
  return rows;
}

/// The kept values of y, also where its roots are given.
inline Array kept_values(const DyCase& d, const GradientCase& c) {
  if (!c.roots) return c.y.values;
  return test::cpu_compress(d.h(), c.tokens, c.features, d.dtype, {Dim::kFeatures, Activation::kRelu2}).values;
}

/// Token by token, then the separate steps.
inline GradientResult reference(const DyCase& d, const GradientCase& c) {
  GradientResult out(c);
  const Array h = d.h();
  for (int row = 0; row < d.tokens; ++row) {
    const Array dh = dh_of_row(d, c.y, h, row);
    std::memcpy(static_cast<char*>(out.dh.data()) + d.token(row) * dh.bytes(), dh.data(), dh.bytes());
  }
  const Array y = decompressed(d, c, kept_values(d, c));
  out.y_tokens = test::cpu_compress(y, c.tokens, c.features, d.dtype, {Dim::kTokens});
  out.dh_tokens = test::cpu_compress(decompressed(d, c, out.dh), c.tokens, c.features, d.dtype, {Dim::kTokens});
  for (int64_t i = 0; i < y.size(); ++i) out.counts[i % c.features] += y[i] != 0;
  return out;
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<__half> {
  static constexpr DType value = DType::kFloat16;
};

/// Guarded memory with the bytes of a host array.
inline Guarded guarded(const void* bytes, int64_t count) {
  Guarded out(count);
  std::memcpy(out.data(), bytes, static_cast<size_t>(count));
  return out;
}

/// The first element of `size` bytes that differs, and whether the guards are as they were.
inline void expect_equal(Guarded& got, const void* expected, int64_t size, const std::string& what) {
  const auto* bytes = got.data<const uint8_t>();
  const auto different = std::mismatch(bytes, bytes + got.bytes(), static_cast<const uint8_t*>(expected)).first;
  EXPECT_EQ((different - bytes) / size, got.bytes() / size) << "the first element that differs, of " << what;
  EXPECT_TRUE(got.intact()) << what;
}

/// All tokens of some features.
struct HotRows {
  HotRows(const DyCase& d, const GradientCase& c, const Array& values, const std::vector<int>& hot)
      : expected(values.dtype(), static_cast<int64_t>(hot.size()) * d.tokens), rows(expected.bytes()) {
    const Array in_rows = decompressed(d, c, values);
    for (int64_t i = 0; i < expected.size(); ++i) {
      const int64_t row = i % d.tokens, feature = hot[i / d.tokens];
      expected.set_code(i / d.tokens * d.tokens + d.token(row), in_rows.code(row * d.features + feature));
    }
  }
  Array expected;
  Guarded rows;
};

/// One matrix along tokens.
struct AlongTokens {
  explicit AlongTokens(const Compressed& like)
      : values(like.values.bytes()), meta(static_cast<int64_t>(like.meta.size())) {}
  cuda::TokenParams params() { return {values.data(), meta.data<uint8_t>()}; }
  void expect_equal(const Compressed& expected, const std::string& what) {
    emulate::expect_equal(values, expected.values.data(), 2, "the values of " + what + " along tokens");
    emulate::expect_equal(meta, expected.meta.data(), 1, "the metadata of " + what + " along tokens");
  }
  Guarded values, meta;
};

/// Every output is the reference's with its padding; nothing else is written, and nothing beside the inputs is read.
/// `run(params)` runs the epilogue over all tiles of the case.
template <class T, class Run>
void compare_gradient(const DyCase& d, bool tokens, bool counted, Run run) {
  SCOPED_TRACE(testing::PrintToString(d));
  const GradientCase c = d.problem();
  const GradientResult expected = reference(d, c);
  Guarded y = guarded(c.y.values.data(), c.y.values.bytes());
  Guarded meta = guarded(c.meta.data(), static_cast<int64_t>(c.meta.size()));
  Guarded dh(expected.dh.bytes());
  AlongTokens y_tokens(expected.y_tokens), dh_tokens(expected.dh_tokens);
  const std::vector<int32_t> zeros(c.features, 0);
  Guarded counts = guarded(zeros.data(), 4 * c.features);

  const std::vector<int> hot{0, d.features / 2 + 1, d.features - 1};
  std::vector<int32_t> slots(d.features, -1);
  for (size_t i = 0; i < hot.size(); ++i) slots[hot[i]] = static_cast<int32_t>(i);
  Guarded slot_of = guarded(slots.data(), 4 * d.features);
  HotRows hot_y(d, c, kept_values(d, c), hot), hot_dh(d, c, expected.dh, hot);

  cuda::GradientParams<T> params{d.tokens,
                                 d.features,
                                 y.data(),
                                 meta.data<uint8_t>(),
                                 dh.data(),
                                 {y_tokens.params(), dh_tokens.params()},
                                 counts.data<int32_t>(),
                                 d.interleaved ? d.tokens / 4 : 0,
                                 c.roots,
                                 slot_of.data<int32_t>(),
                                 {hot_y.rows.data(), hot_dh.rows.data()}};
  if (!tokens) {
    params.along_tokens[0] = params.along_tokens[1] = {};
    params.slots = nullptr;
  }
  if (!tokens || !counted) params.counts = nullptr;
  run(params);

  expect_equal(dh, expected.dh.data(), 2, "dh");
  EXPECT_TRUE(y.intact() && meta.intact());
  if (!tokens) return;
  y_tokens.expect_equal(expected.y_tokens, "y");
  dh_tokens.expect_equal(expected.dh_tokens, "dh");
  if (counted) expect_equal(counts, expected.counts.data(), 4, "counts");
  expect_equal(hot_y.rows, hot_y.expected.data(), 2, "rows of y");
  expect_equal(hot_dh.rows, hot_dh.expected.data(), 2, "rows of dh");
}

}  // namespace sparse24::emulate
