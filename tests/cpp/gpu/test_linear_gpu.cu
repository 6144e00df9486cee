/// @file
/// linear_relu2 and linear_compress on the device, against the CPU reference.
///
/// Operands of small integers make every sum exact, so that y, values, metadata with its padding, amax and the count of
/// saturated values must agree in every bit.
#include <tuple>

#include "support/device_buffer.h"
#include "support/linear_case.h"
#include "support/linear_configs.h"

namespace sparse24::test {
namespace {

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP8 = DType::kFloat8E4M3;

struct Shape {
  int64_t tokens, in, out;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.tokens << " x " << s.in << ", F " << s.out; }

/// One token, tails of the tiles in tokens, features and reduction; the last two have 128x256 tiles for more than one
/// round of 132 CTAs. `out` suits every type: multiples of 32.
const Shape kShapes[] = {{1, 16, 32},      {1, 1040, 1856},   {127, 208, 1856}, {129, 64, 1888},
                         {128, 512, 1856}, {300, 96, 96},     {5, 4096, 160},   {5, 64, 192},
                         {130, 1664, 576}, {1031, 128, 4128}, {2100, 80, 2080}};

class LinearGpu : public GpuTest {
 protected:
  /// A case on the device. Optional operands that are missing have no address.
  struct Device {
    explicit Device(const LinearCase& c)
        : x(c.x),
          w(c.w),
          scale_x(c.scale_x),
          scale_w(c.scale_w),
          scale_y(c.scale_y),
          bias(c.bias ? *c.bias : Array(DType::kFloat32, 0)),
          amax(std::vector<float>{0}),
          saturated(std::vector<int32_t>{0}) {}

    LinearArgs args(const LinearCase& c) {
      LinearArgs a = c.args();
      a.x = x.data();
      a.w = w.data();
      if (a.scale_x) a.scale_x = scale_x.data<float>();
      if (a.scale_w) a.scale_w = scale_w.data<float>();
      if (a.scale_y) a.scale_y = scale_y.data<float>();
      if (a.bias) a.bias = bias.data();
      a.amax = amax.data<float>();
      a.saturated = saturated.data<int32_t>();
      return a;
    }
    void expect_statistics(const LinearStatistics& expected) {
      EXPECT_EQ(amax.to_host<float>(), std::vector<float>{expected.amax}) << "amax";
      EXPECT_EQ(saturated.to_host<int32_t>(), std::vector<int32_t>{expected.saturated}) << "saturated";
    }
    void expect_guards() {
      for (const DeviceBuffer* b : {&x, &w, &scale_x, &scale_w, &scale_y, &bias, &amax, &saturated}) {
        EXPECT_TRUE(b->guards_intact());
      }
    }

    DeviceBuffer x, w, scale_x, scale_w, scale_y, bias, amax, saturated;
  };

  static std::vector<GemmConfig> other_configs(const LinearArgs& args, const LinearTiles& tiles) {
    return other_linear_configs(args.dtype, args.tokens, args.out, tiles);
  }

  /// With the library's choice of configuration, and with others.
  void compare_relu2(const LinearCase& c) {
    const DenseResult expected = cpu_linear_relu2(c);
    compare_relu2(c, expected, nullptr);
    const LinearTiles tiles = linear_relu2_tiles(c.args().dtype, c.y_dtype);
    for (const GemmConfig& other : other_configs(c.args(), tiles)) compare_relu2(c, expected, &other);
  }

  void compare_relu2(const LinearCase& c, const DenseResult& expected, const GemmConfig* config) {
    SCOPED_TRACE(config ? to_string(*config) : "own choice");
    Device device(c);
    DeviceBuffer y(expected.y.bytes());
    uploads_done();
    const LinearRelu2Args args{device.args(c), y.data()};
    config ? cuda::linear_relu2(args, *config, stream_) : cuda::linear_relu2(args, stream_);
    synchronize();
    Array got(c.y_dtype, expected.y.size());
    y.to_host(got);
    const int64_t at = got.first_difference(expected.y);
    EXPECT_EQ(at, -1) << "y[" << at / c.out << ", " << at % c.out << "]";
    device.expect_statistics(expected);
    device.expect_guards();
    EXPECT_TRUE(y.guards_intact());
  }

  void compare_compress(const LinearCase& c, DType meta_dtype) {
    const CompressedResult expected = cpu_linear_compress(c, meta_dtype);
    compare_compress(c, meta_dtype, expected, nullptr);
    const LinearTiles tiles = linear_compress_tiles(c.args().dtype, c.y_dtype, meta_dtype);
    for (const GemmConfig& other : other_configs(c.args(), tiles)) {
      compare_compress(c, meta_dtype, expected, &other);
    }
  }

  void compare_compress(const LinearCase& c, DType meta_dtype, const CompressedResult& expected,
                        const GemmConfig* config) {
    SCOPED_TRACE(config ? to_string(*config) : "own choice");
    Device device(c);
    DeviceBuffer values(expected.values.bytes()), meta(expected.a.meta_bytes());
    uploads_done();
    const LinearCompressArgs args{device.args(c), values.data(), meta.data<uint8_t>(), meta_dtype};
    config ? cuda::linear_compress(args, *config, stream_) : cuda::linear_compress(args, stream_);
    synchronize();
    Array got(c.y_dtype, expected.values.size());
    values.to_host(got);
    const int64_t at = got.first_difference(expected.values), row = c.out / 2;
    EXPECT_EQ(at, -1) << "values[" << at / row << ", " << at % row << "]";
    EXPECT_EQ(first_difference(meta.to_host(), expected.meta), -1) << "meta of " << name_of(meta_dtype);
    device.expect_statistics(expected);
    device.expect_guards();
    EXPECT_TRUE(values.guards_intact() && meta.guards_intact());
  }

  void compare_all(const LinearCase& c) {
    compare_relu2(c);
    compare_compress(c, c.y_dtype);
    if (c.y_dtype != kFP8) compare_compress(c, kFP8);  // values that are quantised afterwards
  }
};

using Case = std::tuple<DType, OutScale, Shape>;
class LinearShapesGpu : public LinearGpu, public testing::WithParamInterface<Case> {};

TEST_P(LinearShapesGpu, EqualTheReferenceOnIntegers) {
  const auto [dtype, kind, s] = GetParam();
  LinearCase c = LinearCase::integers(dtype, s.tokens, s.in, s.out, 1);
  c.scale_output(kind);
  compare_all(c);
  c.add_scales_and_bias(3);
  compare_all(c);
}

INSTANTIATE_TEST_SUITE_P(All, LinearShapesGpu,
                         testing::Combine(testing::Values(kBF16, kFP16, kFP8),
                                          testing::Values(OutScale::kNone, OutScale::kOne, OutScale::kPerToken,
                                                          OutScale::kUnusual),
                                          testing::ValuesIn(kShapes)));

/// By every kernel; training in float16 stores it.
TEST_F(LinearGpu, ReluEqualsTheReference) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    for (const Shape& s : kShapes) {
      for (OutScale kind : {OutScale::kNone, OutScale::kPerToken}) {
        LinearCase c = LinearCase::integers(dtype, s.tokens, s.in, s.out, 11);
        c.activation = Activation::kRelu;
        c.scale_output(kind);
        compare_all(c);
      }
    }
  }
}

/// On a number of h and between two of them, by every kernel.
TEST_F(LinearGpu, ThresholdEqualsTheReference) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    for (OutScale kind : {OutScale::kNone, OutScale::kPerToken}) {
      for (float threshold : {4.0f, 2.3f}) {
        LinearCase c = LinearCase::integers(dtype, 131, 80, 1888, 12);
        c.activation = {Activation::kRelu2, threshold};
        c.scale_output(kind);
        compare_all(c);
        c.add_scales_and_bias(3);
        compare_all(c);
      }
    }
  }
}

TEST_F(LinearGpu, FeaturesOfTheFinestMultiple) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    for (int64_t out : {16, 48, 1872}) compare_compress(LinearCase::integers(dtype, 65, 64, out, 5), kBF16);
    for (int64_t out : {8, 24, 1864}) compare_relu2(LinearCase::integers(dtype, 65, 64, out, 6));
    for (int64_t out : {16, 48, 1872}) {
      LinearCase c = LinearCase::integers(dtype, 65, 64, out, 7);
      c.scale_output(OutScale::kPerToken);
      compare_relu2(c);
    }
  }
}

TEST_F(LinearGpu, OneScaleEach) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    LinearCase c = LinearCase::integers(dtype, 66, 64, 96, 8);
    c.scale_x = {0.5f};
    c.scale_w = {4.0f};
    compare_all(c);
  }
}

TEST_F(LinearGpu, NanIsKeptAndDoesNotCount) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    for (OutScale kind : {OutScale::kNone, OutScale::kPerToken}) {
      LinearCase c = LinearCase::integers(dtype, 130, 64, 96, 9);
      c.scale_output(kind);
      c.x.set(7 * 64 + 3, NAN);   // a token that is NaN everywhere
      c.w.set(50 * 64 + 9, NAN);  // and one feature, in the middle of its group
      compare_all(c);
    }
  }
}

TEST_F(LinearGpu, NothingButNegativesAndZeros) {
  for (DType dtype : {kBF16, kFP16, kFP8}) {
    LinearCase c(130, 64, 96, Array(dtype, std::vector<double>(130 * 64, 1)),
                 Array(dtype, std::vector<double>(96 * 64, -1)));
    compare_all(c);
  }
}

TEST_F(LinearGpu, StatisticsAreOptional) {
  LinearCase c = LinearCase::integers(kFP8, 130, 64, 96, 10);
  c.scale_output(OutScale::kOne);
  const CompressedResult expected = cpu_linear_compress(c, kFP8);
  const DenseResult dense = cpu_linear_relu2(c);
  Device device(c);
  DeviceBuffer values(expected.values.bytes()), meta(expected.a.meta_bytes()), y(dense.y.bytes());
  LinearArgs args = device.args(c);
  args.amax = nullptr;
  args.saturated = nullptr;
  uploads_done();
  cuda::linear_compress({args, values.data(), meta.data<uint8_t>(), kFP8}, stream_);
  cuda::linear_relu2({args, y.data()}, stream_);
  synchronize();
  Array got(kFP8, expected.values.size()), got_y(kFP8, dense.y.size());
  values.to_host(got);
  y.to_host(got_y);
  EXPECT_EQ(got.first_difference(expected.values), -1);
  EXPECT_EQ(got_y.first_difference(dense.y), -1);
  EXPECT_EQ(first_difference(meta.to_host(), expected.meta), -1);
}

}  // namespace
}  // namespace sparse24::test
