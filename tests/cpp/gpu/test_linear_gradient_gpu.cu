/// @file
/// linear_gradient on the device, against the CPU reference.
///
/// Operands of small integers make every sum exact, so that values, metadata with its padding and counts must agree in
/// every bit.
#include <numeric>
#include <tuple>

#include "support/device_buffer.h"
#include "support/gradient_case.h"

namespace sparse24::test {
namespace {

struct Shape {
  int64_t tokens, in, features;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.tokens << " x " << s.in << ", F " << s.features; }

/// One token, tails of the tiles and of the metadata's atoms in tokens, features and reduction, odd reductions; with
/// tokens in multiples of 32, whose rows the kernel finds, and others.
const Shape kShapes[] = {{1, 16, 16},      {1, 1040, 1856}, {2, 8, 32},      {127, 208, 1856},  {129, 64, 1888},
                         {128, 512, 1856}, {300, 96, 96},   {5, 4096, 160},  {66, 1, 48},       {131, 77, 272},
                         {32, 40, 48},     {96, 130, 272},  {160, 72, 1856}, {1031, 130, 4128}, {1056, 200, 416}};

class GradientGpu : public GpuTest {
 protected:
  struct Output {
    explicit Output(const Compressed& like)
        : values(like.values.bytes()), meta(static_cast<int64_t>(like.meta.size())) {}
    TokenCompressed args() { return {values.data(), meta.data<uint8_t>()}; }
    void expect_equal(const Compressed& expected) {
      Array got(expected.values.dtype(), expected.values.size());
      values.to_host(got);
      EXPECT_EQ(got.first_difference(expected.values), -1);
      EXPECT_EQ(first_difference(meta.to_host(), expected.meta), -1) << "metadata";
      EXPECT_TRUE(values.guards_intact() && meta.guards_intact());
    }
    DeviceBuffer values, meta;
  };

  /// Rows of grad as the kernels want them, `ld` apart and with NaN between them.
  static Array spread(const GradientCase& c, const Array& rows, int64_t ld) {
    const int64_t count = c.in == 0 ? 0 : rows.size() / c.in;
    Array out(c.grad.dtype(), count * ld);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < c.in; ++k) out.set_code(r * ld + k, rows.code(r * c.in + k));
    }
    return out;
  }

  void compare(const GradientCase& c, const GradientResult& expected, const GemmConfig* config, bool wants_counts) {
    SCOPED_TRACE(config ? to_string(*config) : "own choice");
    const int64_t ld = round_up(c.in, 8);
    DeviceBuffer grad(spread(c, c.grad, ld)), tail(spread(c, grad_tail(c), ld)), w(c.w), y(c.y.values), meta(c.meta);
    DeviceBuffer dh(expected.dh.bytes()), counts(std::vector<int32_t>(c.features, 0));
    Output y_tokens(expected.y_tokens), dh_tokens(expected.dh_tokens);
    DeviceBuffer hot(c.hot), slots(4 * c.features), y_hot(expected.y_hot.bytes()), dh_hot(expected.dh_hot.bytes());
    uploads_done();
    const LinearGradientArgs args{c.tokens,
                                  c.in,
                                  c.features,
                                  grad.data(),
                                  ld,
                                  w.data(),
                                  c.grad.dtype(),
                                  c.hidden(),
                                  y.data(),
                                  meta.data<uint8_t>(),
                                  c.meta_dtype,
                                  dh.data(),
                                  y_tokens.args(),
                                  dh_tokens.args(),
                                  wants_counts ? counts.data<int32_t>() : nullptr,
                                  c.interleaved,
                                  c.tokens % kGradTokenMultiple != 0 ? tail.data() : nullptr,
                                  hot.data<int64_t>(),
                                  static_cast<int64_t>(c.hot.size()),
                                  y_hot.data(),
                                  dh_hot.data(),
                                  slots.data<int32_t>(),
                                  c.roots};
    config ? cuda::linear_gradient(args, *config, stream_) : cuda::linear_gradient(args, stream_);
    synchronize();
    Array got(c.hidden(), expected.dh.size());
    dh.to_host(got);
    const int64_t at = got.first_difference(expected.dh), row = c.features / 2;
    EXPECT_EQ(at, -1) << "dh[" << at / row << ", " << at % row << "]";
    y_tokens.expect_equal(expected.y_tokens);
    dh_tokens.expect_equal(expected.dh_tokens);
    const std::vector<int32_t> unwanted(c.features, 0);
    EXPECT_EQ(first_difference(counts.to_host<int32_t>(), wants_counts ? expected.counts : unwanted), -1) << "counts";
    expect_rows("y_hot", y_hot, expected.y_hot, c.tokens);
    expect_rows("dh_hot", dh_hot, expected.dh_hot, c.tokens);
    for (const DeviceBuffer* b : {&grad, &tail, &w, &y, &meta, &dh, &counts, &hot, &slots, &y_hot, &dh_hot}) {
      EXPECT_TRUE(b->guards_intact());
    }
  }

  static void expect_rows(const char* name, const DeviceBuffer& rows, const Array& expected, int64_t tokens) {
    Array got(expected.dtype(), expected.size());
    rows.to_host(got);
    const int64_t at = got.first_difference(expected);
    EXPECT_EQ(at, -1) << name << "[" << at / tokens << ", " << at % tokens << "]";
  }

  /// With the library's choice of configuration, and with the other raster order and a swizzle that pads. Counts or hot
  /// features, as the op asks for them.
  void compare(const GradientCase& c) {
    const GradientResult expected = cpu_linear_gradient(c);
    const bool wants_counts = c.hot.empty();
    compare(c, expected, nullptr, wants_counts);
    GemmConfig other = select_linear_gradient_config(c.grad.dtype(), c.tokens, c.features, 132);
    other.raster_along_m = !other.raster_along_m;
    other.swizzle = 8;
    compare(c, expected, &other, wants_counts);
  }
};

using Case = std::tuple<DType, bool, bool, Shape>;
class GradientShapesGpu : public GradientGpu, public testing::WithParamInterface<Case> {};

TEST_P(GradientShapesGpu, EqualTheReferenceOnIntegers) {
  const auto [dtype, fp8_meta, specials, s] = GetParam();
  const int64_t features = round_up(s.features, fp8_meta ? 32 : 16);
  GradientCase c = GradientCase::integers(dtype, s.tokens, s.in, features, 1, specials);
  if (fp8_meta) c = std::move(c).with_fp8_meta();
  compare(c);
  c.interleaved = true;
  compare(c);
}

/// The first, the last, and neighbours within groups, words and lanes; all of them; and indices that are wrong.
TEST_P(GradientShapesGpu, HotFeaturesEqualTheReference) {
  const auto [dtype, fp8_meta, specials, s] = GetParam();
  const int64_t features = round_up(s.features, fp8_meta ? 32 : 16);
  GradientCase c = GradientCase::integers(dtype, s.tokens, s.in, features, 1, specials);
  if (fp8_meta) c = std::move(c).with_fp8_meta();
  std::vector<int64_t> some, all(features);
  for (int64_t f = 0; f < features; f += 1 + f % 5 * (f % 3)) some.push_back(f);
  if (some.back() != features - 1) some.push_back(features - 1);
  std::iota(all.begin(), all.end(), 0);
  const std::vector<int64_t> wrong{-1, 0, 3, 3, 2, 5, features - 1, features, 7};
  c.interleaved = specials;  // so that all occur with both orders
  for (const auto& hot : {some, all, wrong}) {
    c.hot = hot;
    c.interleaved = !c.interleaved;
    compare(c);
  }
}

INSTANTIATE_TEST_SUITE_P(All, GradientShapesGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16), testing::Bool(),
                                          testing::Bool(), testing::ValuesIn(kShapes)));

/// What training in float16 stores.
TEST_F(GradientGpu, RootsEqualTheReference) {
  for (const Shape& s : kShapes) {
    for (bool fp8_meta : {false, true}) {
      const int64_t features = round_up(s.features, 32);
      GradientCase c = GradientCase::integers(DType::kFloat16, s.tokens, s.in, features, 1, /*specials=*/fp8_meta,
                                              Activation::kRelu);
      if (fp8_meta) c = std::move(c).with_fp8_meta();
      compare(c);
      c.interleaved = true;
      c.hot = {0, 7, features - 1};
      compare(c);
    }
  }
}

/// Also beside the counts, which the kernel can give with them.
TEST_F(GradientGpu, CountsBesideHotFeatures) {
  GradientCase c = GradientCase::integers(DType::kBFloat16, 131, 77, 272, 1);
  c.hot = {0, 7, 8, 200, 271};
  const GradientResult expected = cpu_linear_gradient(c);
  compare(c, expected, nullptr, /*wants_counts=*/true);
}

/// More rows than a block of the look-up has threads, with wrong indices far from each other.
TEST_F(GradientGpu, ManyHotFeatures) {
  GradientCase c = GradientCase::integers(DType::kFloat16, 160, 72, 4096, 1);
  for (int64_t f = 0; f < 4096; f += 3) c.hot.push_back(f);
  compare(c);
  c.hot[1] = 3000;  // all below it that follow are wrong
  c.hot[1200] = c.hot[1199];
  compare(c);
}

TEST_F(GradientGpu, NanOfATokenStaysThere) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    GradientCase c = GradientCase::integers(dtype, 130, 64, 96, 9);
    c.grad.set(7 * 64 + 3, NAN);  // a token that is NaN everywhere
    c.w.set(9 * 96 + 50, NAN);    // and one feature, in the middle of its group
    compare(c);
  }
}

/// Every number that y can be, subnormals and infinity among them: the root is the nearest. And every root.
TEST_F(GradientGpu, EveryRoot) {
  for (const auto& [dtype, roots] : {std::make_pair(DType::kBFloat16, false), std::make_pair(DType::kFloat16, false),
                                     std::make_pair(DType::kFloat16, true)}) {
    constexpr int64_t kTokens = 2048, kFeatures = 32;  // 2^15 kept values
    GradientCase c = GradientCase::integers(dtype, kTokens, 8, kFeatures, 11);
    for (int64_t i = 0; i < c.y.values.size(); ++i) {
      c.y.values.set_code(i, std::min<uint32_t>(i, format_of(dtype).first_special));
    }
    c.roots = roots;
    compare(c);
  }
}

}  // namespace
}  // namespace sparse24::test
