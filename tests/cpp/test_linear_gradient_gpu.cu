/// @file
/// linear_gradient on the device, against the CPU reference.
///
/// Operands of small integers make every sum exact, so that values, metadata with its padding and counts must agree in
/// every bit.
#include <tuple>

#include "device_buffer.h"
#include "gradient_case.h"
#include "linear_configs.h"

namespace sparse24::test {
namespace {

struct Shape {
  int64_t tokens, in, features;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.tokens << " x " << s.in << ", F " << s.features; }

/// One token, tails of the tiles and of the metadata's atoms in tokens, features and reduction, odd reductions.
const Shape kShapes[] = {{1, 16, 16},     {1, 1040, 1856},  {2, 8, 32},       {127, 208, 1856},
                         {129, 64, 1888}, {128, 512, 1856}, {300, 96, 96},    {5, 4096, 160},
                         {66, 1, 48},     {131, 77, 272},   {1031, 130, 4128}};

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

  /// grad with rows `ld` apart and NaN between them.
  static Array spread(const GradientCase& c, int64_t ld) {
    Array out(c.grad.dtype(), c.tokens * ld);
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t k = 0; k < c.in; ++k) out.set_code(t * ld + k, c.grad.code(t * c.in + k));
    }
    return out;
  }

  void compare(const GradientCase& c, const GradientResult& expected, const LinearConfig* config) {
    SCOPED_TRACE(config ? to_string(*config) : "own choice");
    const int64_t ld = round_up(c.in, 8);
    DeviceBuffer grad(spread(c, ld)), w(c.w), y(c.y.values), meta(c.meta);
    DeviceBuffer dh(expected.dh.bytes()), counts(std::vector<int32_t>(c.features, 0));
    Output y_tokens(expected.y_tokens), dh_tokens(expected.dh_tokens);
    uploads_done();
    const LinearGradientArgs args{
        c.tokens,     c.in,           c.features,      grad.data(),      ld,
        w.data(),     c.grad.dtype(), c.hidden(),      y.data(),         meta.data<uint8_t>(),
        c.meta_dtype, dh.data(),      y_tokens.args(), dh_tokens.args(), counts.data<int32_t>(),
        c.interleaved};
    config ? cuda::linear_gradient(args, *config, stream_) : cuda::linear_gradient(args, stream_);
    synchronize();
    Array got(c.hidden(), expected.dh.size());
    dh.to_host(got);
    const int64_t at = got.first_difference(expected.dh), row = c.features / 2;
    EXPECT_EQ(at, -1) << "dh[" << at / row << ", " << at % row << "]";
    y_tokens.expect_equal(expected.y_tokens);
    dh_tokens.expect_equal(expected.dh_tokens);
    EXPECT_EQ(first_difference(counts.to_host<int32_t>(), expected.counts), -1) << "counts";
    for (const DeviceBuffer* b : {&grad, &w, &y, &meta, &dh, &counts}) EXPECT_TRUE(b->guards_intact());
  }

  /// With the library's choice of configuration, and with the other raster order and a swizzle that pads.
  void compare(const GradientCase& c) {
    const GradientResult expected = cpu_linear_gradient(c);
    compare(c, expected, nullptr);
    for (const LinearConfig& other : other_linear_configs(c.grad.dtype(), c.tokens, c.features, LinearTile::k128x128)) {
      compare(c, expected, &other);
    }
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

INSTANTIATE_TEST_SUITE_P(All, GradientShapesGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16), testing::Bool(),
                                          testing::Bool(), testing::ValuesIn(kShapes)));

TEST_F(GradientGpu, NanOfATokenStaysThere) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    GradientCase c = GradientCase::integers(dtype, 130, 64, 96, 9);
    c.grad.set(7 * 64 + 3, NAN);  // a token that is NaN everywhere
    c.w.set(9 * 96 + 50, NAN);    // and one feature, in the middle of its group
    compare(c);
  }
}

/// Every number that y can be, subnormals and infinity among them: the root is the nearest.
TEST_F(GradientGpu, EveryRoot) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    constexpr int64_t kTokens = 2048, kFeatures = 32;  // 2^15 kept values
    GradientCase c = GradientCase::integers(dtype, kTokens, 8, kFeatures, 11);
    for (int64_t i = 0; i < c.y.values.size(); ++i) {
      c.y.values.set_code(i, std::min<uint32_t>(i, format_of(dtype).first_special));
    }
    compare(c);
  }
}

}  // namespace
}  // namespace sparse24::test
