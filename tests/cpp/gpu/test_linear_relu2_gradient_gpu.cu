/// @file
/// linear_relu2_gradient on the device, against the CPU reference.
///
/// Operands of small integers make every sum exact, so that dh must agree in every bit.
#include <tuple>

#include "support/device_buffer.h"
#include "support/linear_configs.h"
#include "support/relu2_gradient_case.h"

namespace sparse24::test {
namespace {

struct Shape {
  int64_t tokens, in, features;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.tokens << " x " << s.in << ", F " << s.features; }

/// One token, tails of the tiles and of a quad's columns in tokens, features and reduction, odd reductions.
const Shape kShapes[] = {{1, 16, 8},      {1, 1040, 1856},  {2, 8, 24},       {127, 208, 1856},
                         {129, 64, 1864}, {128, 512, 1856}, {300, 96, 96},    {5, 4096, 160},
                         {66, 1, 40},     {131, 77, 264},   {1031, 130, 4104}};

class Relu2GradientGpu : public GpuTest {
 protected:
  /// grad with rows `ld` apart and NaN between them.
  static Array spread(const Relu2GradientCase& c, int64_t ld) {
    Array out(c.grad.dtype(), c.tokens * ld);
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t k = 0; k < c.in; ++k) out.set_code(t * ld + k, c.grad.code(t * c.in + k));
    }
    return out;
  }

  void compare(const Relu2GradientCase& c, const Array& expected, const GemmConfig* config) {
    SCOPED_TRACE(config ? to_string(*config) : "own choice");
    const int64_t ld = round_up(c.in, 8);
    DeviceBuffer grad(spread(c, ld)), w(c.w), y(c.y), dh(expected.bytes());
    uploads_done();
    const LinearRelu2GradientArgs args{c.tokens,       c.in,        c.features, grad.data(), ld,     w.data(),
                                       c.grad.dtype(), c.y.dtype(), y.data(),   dh.data(),   c.roots};
    config ? cuda::linear_relu2_gradient(args, *config, stream_) : cuda::linear_relu2_gradient(args, stream_);
    synchronize();
    Array got(c.y.dtype(), expected.size());
    dh.to_host(got);
    const int64_t at = got.first_difference(expected);
    EXPECT_EQ(at, -1) << "dh[" << at / c.features << ", " << at % c.features << "]";
    for (const DeviceBuffer* b : {&grad, &w, &y, &dh}) EXPECT_TRUE(b->guards_intact());
  }

  /// With the library's choice of configuration, and with the other raster order and a swizzle that pads.
  void compare(const Relu2GradientCase& c) {
    const Array expected = cpu_linear_relu2_gradient(c);
    compare(c, expected, nullptr);
    const LinearTiles tiles = linear_relu2_gradient_tiles();
    for (const GemmConfig& other : other_linear_configs(c.grad.dtype(), c.tokens, c.features, tiles))
      compare(c, expected, &other);
  }
};

using Case = std::tuple<DType, bool, Shape>;
class Relu2GradientShapesGpu : public Relu2GradientGpu, public testing::WithParamInterface<Case> {};

TEST_P(Relu2GradientShapesGpu, EqualTheReferenceOnIntegers) {
  const auto [dtype, specials, s] = GetParam();
  compare(Relu2GradientCase::integers(dtype, s.tokens, s.in, s.features, 1, specials));
}

INSTANTIATE_TEST_SUITE_P(All, Relu2GradientShapesGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16), testing::Bool(),
                                          testing::ValuesIn(kShapes)));

/// What training in float16 stores: the same numbers, taken as roots.
TEST_F(Relu2GradientGpu, RootsEqualTheReference) {
  for (const Shape& s : kShapes) {
    Relu2GradientCase c =
        Relu2GradientCase::integers(DType::kFloat16, s.tokens, s.in, s.features, 1, /*specials=*/true);
    c.roots = true;
    compare(c);
  }
}

TEST_F(Relu2GradientGpu, NanOfATokenStaysThere) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Relu2GradientCase c = Relu2GradientCase::integers(dtype, 130, 64, 96, 9);
    c.grad.set(7 * 64 + 3, NAN);  // a token that is NaN everywhere
    c.w.set(9 * 96 + 50, NAN);    // and one feature
    compare(c);
  }
}

/// Every number that y can be, subnormals and infinity among them: the root is the nearest.
TEST_F(Relu2GradientGpu, EveryRoot) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    constexpr int64_t kTokens = 1024, kFeatures = 32;  // 2^15 numbers
    Relu2GradientCase c = Relu2GradientCase::integers(dtype, kTokens, 8, kFeatures, 11);
    for (int64_t i = 0; i < c.y.size(); ++i) c.y.set_code(i, std::min<uint32_t>(i, format_of(dtype).first_special));
    compare(c);
  }
}

}  // namespace
}  // namespace sparse24::test
