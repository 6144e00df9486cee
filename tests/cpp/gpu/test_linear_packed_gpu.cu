/// @file
/// linear_compress_packed on the device, against the CPU reference.
///
/// Operands of small integers make every sum exact, so that values, metadata with its padding, amax and the count of
/// saturated values must agree in every bit.
#include "support/device_buffer.h"
#include "support/packed_case.h"

namespace sparse24::test {
namespace {

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP8 = DType::kFloat8E4M3;

struct Shape {
  int64_t tokens, in, out;
};
/// One token, tails of the tiles in tokens, features and reduction, fewer K tiles than steps, several waves.
const Shape kShapes[] = {{1, 32, 32},     {127, 224, 1856}, {257, 64, 288},   {300, 96, 96},
                         {130, 1664, 96}, {515, 2048, 64},  {4100, 32, 4128}, {4100, 544, 4128}};

/// By the reference for packed weights: NaN of x reaches the features whose weight for it was kept.
CompressedResult on_cpu(const PackedCase& c, DType meta_dtype) {
  CompressedResult out(c.linear, meta_dtype);
  LinearCompressPackedArgs args = c.args(meta_dtype, out.values.data(), out.meta.data());
  args.compress.linear.amax = &out.amax;
  args.compress.linear.saturated = &out.saturated;
  cpu::linear_compress_packed(args);
  return out;
}

class LinearPackedGpu : public GpuTest {
 protected:
  void compare(LinearCase linear, DType meta_dtype, size_t tile) {
    SCOPED_TRACE(testing::Message() << name_of(linear.x.dtype()) << " " << linear.tokens << " x " << linear.in << ", F "
                                    << linear.out << ", y " << name_of(linear.y_dtype) << ", meta "
                                    << name_of(meta_dtype) << ", tile " << tile);
    const PackedCase c(std::move(linear));
    const CompressedResult expected = on_cpu(c, meta_dtype);
    DeviceBuffer x(c.linear.x), w(c.packed.values), w_meta(c.packed.meta), scale_x(c.linear.scale_x),
        scale_w(c.linear.scale_w), scale_y(c.linear.scale_y),
        bias(c.linear.bias ? *c.linear.bias : Array(DType::kFloat32, 0)), amax(std::vector<float>{0}),
        saturated(std::vector<int32_t>{0}), values(expected.values.bytes()), meta(expected.a.meta_bytes());
    LinearCompressPackedArgs args = c.args(meta_dtype, values.data(), meta.data<uint8_t>());
    LinearArgs& a = args.compress.linear;
    args.w_meta = w_meta.data<uint8_t>();
    a.x = x.data();
    a.w = w.data();
    if (a.scale_x) a.scale_x = scale_x.data<float>();
    if (a.scale_w) a.scale_w = scale_w.data<float>();
    if (a.scale_y) a.scale_y = scale_y.data<float>();
    if (a.bias) a.bias = bias.data();
    a.amax = amax.data<float>();
    a.saturated = saturated.data<int32_t>();
    uploads_done();
    GemmConfig config = linear_packed_configs(a)[tile];
    config.swizzle = 8;
    cuda::linear_compress_packed(args, config, stream_);
    synchronize();
    Array got(c.linear.y_dtype, expected.values.size());
    values.to_host(got);
    const int64_t at = got.first_difference(expected.values), row = c.linear.out / 2;
    EXPECT_EQ(at, -1) << "values[" << at / row << ", " << at % row << "]";
    EXPECT_EQ(first_difference(meta.to_host(), expected.meta), -1);
    EXPECT_EQ(amax.to_host<float>(), std::vector<float>{expected.amax});
    EXPECT_EQ(saturated.to_host<int32_t>(), std::vector<int32_t>{expected.saturated});
    EXPECT_TRUE(values.guards_intact() && meta.guards_intact() && amax.guards_intact() && saturated.guards_intact());
  }
  void compare(const LinearCase& linear, DType meta_dtype) {
    const size_t tiles = linear_packed_configs(linear.args()).size();
    for (size_t tile = 0; tile < tiles; ++tile) compare(linear, meta_dtype, tile);
  }
  /// In the types that are compiled.
  template <class Change>
  void compare_all(const Shape& s, const Change& change) {
    for (DType dtype : {kBF16, kFP16, kFP8}) {
      LinearCase c = LinearCase::integers(dtype, s.tokens, s.in, s.out, 1);
      change(c);
      if (dtype != kFP8) {
        compare(c, dtype);
        continue;
      }
      compare(c, kFP8);
      for (OutScale kind : {OutScale::kOne, OutScale::kPerToken, OutScale::kUnusual}) {
        LinearCase scaled = c;
        scaled.scale_output(kind);
        compare(scaled, kFP8);
      }
    }
  }
};

TEST_F(LinearPackedGpu, EqualsTheReferenceOnIntegers) {
  for (const Shape& s : kShapes) {
    compare_all(s, [](LinearCase&) {});
    compare_all(s, [](LinearCase& c) { c.add_scales_and_bias(3); });
  }
}

TEST_F(LinearPackedGpu, ActivationsEqualTheReference) {
  compare_all({131, 96, 1888}, [](LinearCase& c) { c.activation = Activation::kRelu; });
  for (float threshold : {4.0f, 2.3f}) {
    compare_all({131, 96, 1888}, [&](LinearCase& c) { c.activation = {Activation::kRelu2, threshold}; });
  }
}

TEST_F(LinearPackedGpu, NanIsKeptAndDoesNotCount) {
  compare_all({130, 64, 96}, [](LinearCase& c) {
    c.x.set(7 * 64 + 3, NAN);  // a token that is NaN where its weight was kept
  });
}

}  // namespace
}  // namespace sparse24::test
