/// @file
/// compress, compress_like, decompress and quantize_fp8 on the device: bit for bit what the CPU reference gives.
#include <tuple>

#include "support/compressed.h"
#include "support/device_buffer.h"

namespace sparse24::test {
namespace {

constexpr DType kFP8 = DType::kFloat8E4M3;

enum class Scale { kComputed, kGiven };

struct Shape {
  int64_t rows, cols;
};
void PrintTo(const Shape& s, std::ostream* out) { *out << s.rows << " x " << s.cols; }

/// Columns suit all values and dims: multiples of 32. Rows that registers hold, and wider ones.
const Shape kShapes[] = {{0, 64},     {5, 0},       {1, 32},   {3, 64},    {5, 1856},   {127, 96},
                         {129, 4096}, {130, 15680}, {7, 8192}, {8191, 64}, {515, 8192}, {3, 40032}};

std::vector<uint32_t> bits_of_scales(const std::vector<float>& scale) {
  std::vector<uint32_t> bits(scale.size());
  if (!scale.empty()) std::memcpy(bits.data(), scale.data(), 4 * scale.size());
  return bits;
}

class CompressGpu : public GpuTest {
 protected:
  /// Compresses on both sides and compares everything.
  void compare(const Array& x, Shape s, DType values_dtype, const How& how) {
    const Compressed expected = cpu_compress(x, s.rows, s.cols, values_dtype, how);
    DeviceBuffer dx(x), values(expected.values.bytes()), meta(expected.a.meta_bytes());
    DeviceBuffer given(how.given_scale), computed(static_cast<int64_t>(4 * expected.scale.size()));
    CompressArgs args{dx.data(),     x.dtype(),           s.rows, s.cols, how.dim, how.activation, values_dtype,
                      values.data(), meta.data<uint8_t>()};
    args.scaling = how.scaling;
    if (!how.given_scale.empty()) args.given_scale = given.data<float>();
    if (!expected.scale.empty()) args.computed_scale = computed.data<float>();
    uploads_done();
    cuda::compress(args, stream_);
    synchronize();

    EXPECT_EQ(first_difference(bits_of_scales(computed.to_host<float>()), bits_of_scales(expected.scale)), -1)
        << "scale";
    Array got(values_dtype, expected.values.size());
    values.to_host(got);
    EXPECT_EQ(got.first_difference(expected.values), -1) << "values";
    EXPECT_EQ(first_difference(meta.to_host(), expected.meta), -1) << "meta";
    for (const DeviceBuffer* b : {&dx, &values, &meta, &given, &computed}) EXPECT_TRUE(b->guards_intact());
  }
};

using Case16 = std::tuple<DType, Dim, Activation, Shape>;
class Compress16Gpu : public CompressGpu, public testing::WithParamInterface<Case16> {};

TEST_P(Compress16Gpu, EqualsTheReference) {
  const auto [dtype, dim, activation, s] = GetParam();
  compare(random_activations(dtype, s.rows * s.cols, 1), s, dtype, {dim, activation});
}

INSTANTIATE_TEST_SUITE_P(All, Compress16Gpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16),
                                          testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(Activation::kNone, Activation::kRelu, Activation::kRelu2),
                                          testing::ValuesIn(kShapes)));

using CaseFp8 = std::tuple<DType, Dim, Activation, Shape, Scaling, Scale>;
class CompressFp8Gpu : public CompressGpu, public testing::WithParamInterface<CaseFp8> {};

TEST_P(CompressFp8Gpu, EqualsTheReference) {
  const auto [dtype, dim, activation, s, scaling, scale] = GetParam();
  How how{dim, activation, scaling};
  if (scale == Scale::kGiven) {
    const int64_t m = dim == Dim::kFeatures ? s.rows : s.cols;
    for (int64_t i = 0; i < (scaling == Scaling::kRow ? m : 1); ++i)
      how.given_scale.push_back(i % 5 == 4 ? 0.0f : 0.001f * (1 + i % 17));
    if (how.given_scale.empty()) return;  // no rows, no scales
  }
  compare(random_activations(dtype, s.rows * s.cols, 2), s, kFP8, how);
  // Without infinities a scale for the whole tensor is finite, and most values are neither 0 nor NaN.
  compare(random_activations(dtype, s.rows * s.cols, 3, /*specials=*/false), s, kFP8, how);
}

INSTANTIATE_TEST_SUITE_P(All, CompressFp8Gpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16),
                                          testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(Activation::kNone, Activation::kRelu, Activation::kRelu2),
                                          testing::ValuesIn(kShapes), testing::Values(Scaling::kRow, Scaling::kTensor),
                                          testing::Values(Scale::kComputed, Scale::kGiven)));

TEST_F(CompressGpu, EveryNumberOfSixteenBits) {
  // All 65,536 codes: as the first of a group, so that each is kept whenever it is not zero.
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    Array x(dtype, 4 * 65536);
    for (int64_t i = 0; i < 65536; ++i) {
      x.set_code(4 * i, static_cast<uint32_t>(i));
      for (int j = 1; j < 4; ++j) x.set_code(4 * i + j, static_cast<uint32_t>(i * 40503 + j * 10007) & 0xFFFF);
    }
    const ActivationArgs activations[] = {
        Activation::kNone,          Activation::kRelu,           Activation::kRelu2,         {Activation::kRelu, 0.3f},
        {Activation::kRelu2, 1.0f}, {Activation::kRelu2, 1e-6f}, {Activation::kRelu2, 3e38f}};
    for (const ActivationArgs& activation : activations) {
      compare(x, {1024, 256}, dtype, {Dim::kFeatures, activation});
      compare(x, {1024, 256}, kFP8, {Dim::kFeatures, activation});
      compare(x, {1024, 256}, kFP8, {Dim::kFeatures, activation, Scaling::kTensor, {0.37f}});
      compare(x, {1024, 256}, kFP8, {Dim::kTokens, activation});
    }
  }
}

using CaseLike = std::tuple<DType, Dim, Shape>;
class CompressLikeGpu : public GpuTest, public testing::WithParamInterface<CaseLike> {
 protected:
  /// Both ops with the metadata of c: x gathered at its pattern, and `values` scattered to it.
  void compare(const Compressed& c, const Array& values, const Array& x) {
    const auto [dtype, dim, s] = GetParam();
    Array gathered(dtype, c.values.size()), dense(dtype, x.size());
    cpu::compress_like({x.data(), dtype, s.rows, s.cols, dim, c.meta.data(), gathered.data()});
    cpu::decompress({values.data(), c.meta.data(), dtype, s.rows, s.cols, dim, dense.data()});
    DeviceBuffer dx(x), meta(c.meta), dvalues(values), like(gathered.bytes()), out(x.bytes());
    uploads_done();
    cuda::compress_like({dx.data(), dtype, s.rows, s.cols, dim, meta.data<uint8_t>(), like.data()}, stream_);
    cuda::decompress({dvalues.data(), meta.data<uint8_t>(), dtype, s.rows, s.cols, dim, out.data()}, stream_);
    synchronize();
    Array got_like(dtype, gathered.size()), got_dense(dtype, dense.size());
    like.to_host(got_like);
    out.to_host(got_dense);
    EXPECT_EQ(got_like.first_difference(gathered), -1) << "compress_like";
    EXPECT_EQ(got_dense.first_difference(dense), -1) << "decompress";
    for (const DeviceBuffer* b : {&dx, &meta, &dvalues, &like, &out}) EXPECT_TRUE(b->guards_intact());
  }
};

TEST_P(CompressLikeGpu, AndDecompressEqualTheReference) {
  const auto [dtype, dim, s] = GetParam();
  const bool fp8 = dtype == kFP8;
  const DType source = fp8 ? DType::kBFloat16 : dtype;
  const Array patterns = random_activations(source, s.rows * s.cols, 4);
  const Compressed c = cpu_compress(patterns, s.rows, s.cols, dtype, {dim});
  const Array x = random_activations(dtype, s.rows * s.cols, 5);
  compare(c, c.values, x);
}

TEST_P(CompressLikeGpu, AnyMetadataIsReadAsTheReferenceDoes) {
  const auto [dtype, dim, s] = GetParam();
  Compressed c(s.rows, s.cols, dtype, dim);
  c.keep_any(11);
  const Array kept = random_activations(dtype, c.values.size(), 12), x = random_activations(dtype, s.rows * s.cols, 13);
  compare(c, kept, x);
}

INSTANTIATE_TEST_SUITE_P(All, CompressLikeGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16, kFP8),
                                          testing::Values(Dim::kFeatures, Dim::kTokens), testing::ValuesIn(kShapes)));

using CaseQuantize = std::tuple<DType, Shape, Scaling, Scale>;
class QuantizeGpu : public GpuTest, public testing::WithParamInterface<CaseQuantize> {};

TEST_P(QuantizeGpu, EqualsTheReference) {
  const auto [dtype, s, scaling, scale] = GetParam();
  const int64_t scales = scaling == Scaling::kRow ? s.rows : 1;
  for (bool specials : {true, false}) {
    const Array x = random_activations(dtype, s.rows * s.cols, 6, specials);
    Array expected(kFP8, x.size()), got(kFP8, x.size());
    std::vector<float> scale_of_row(scales, NAN);
    QuantizeArgs args{x.data(), dtype, s.rows, s.cols, expected.data(), scaling};
    if (scale == Scale::kGiven) {
      for (int64_t i = 0; i < scales; ++i) scale_of_row[i] = i % 5 == 4 ? 1e-39f : 0.002f * (1 + i % 13);
      args.given_scale = scale_of_row.data();
    } else {
      args.computed_scale = scale_of_row.data();
    }
    DeviceBuffer dx(x), q(expected.bytes()), dscale(scale_of_row);  // a computed scale starts as NaN
    cpu::quantize_fp8(args);

    args.x = dx.data();
    args.q = q.data();
    (scale == Scale::kGiven ? (args.given_scale = dscale.data<float>()) : (args.computed_scale = dscale.data<float>()));
    uploads_done();
    cuda::quantize_fp8(args, stream_);
    synchronize();
    q.to_host(got);
    EXPECT_EQ(first_difference(bits_of_scales(dscale.to_host<float>()), bits_of_scales(scale_of_row)), -1) << "scale";
    EXPECT_EQ(got.first_difference(expected), -1) << "q";
    for (const DeviceBuffer* b : {&dx, &q, &dscale}) EXPECT_TRUE(b->guards_intact());
  }
}

INSTANTIATE_TEST_SUITE_P(All, QuantizeGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16),
                                          testing::ValuesIn(kShapes), testing::Values(Scaling::kRow, Scaling::kTensor),
                                          testing::Values(Scale::kComputed, Scale::kGiven)));

using CasePredict = std::tuple<DType, Shape>;
class PredictGpu : public GpuTest, public testing::WithParamInterface<CasePredict> {};

TEST_P(PredictGpu, EqualsTheReference) {
  const auto [dtype, s] = GetParam();
  for (bool specials : {true, false}) {
    const Array x = random_activations(dtype, s.rows * s.cols, 7, specials);
    Array expected(kFP8, x.size()), got(kFP8, x.size());
    std::vector<float> factor{0.37f}, scale(s.rows, NAN), predicted(s.rows, NAN);
    QuantizeArgs args{x.data(),      dtype,   s.rows,       s.cols,        expected.data(),
                      Scaling::kRow, nullptr, scale.data(), factor.data(), predicted.data()};
    DeviceBuffer dx(x), q(expected.bytes()), dfactor(factor), dscale(scale), dpredicted(predicted);
    cpu::quantize_fp8(args);
    args.x = dx.data();
    args.q = q.data();
    args.computed_scale = dscale.data<float>();
    args.factor = dfactor.data<float>();
    args.predicted = dpredicted.data<float>();
    uploads_done();
    cuda::quantize_fp8(args, stream_);
    synchronize();
    q.to_host(got);
    EXPECT_EQ(got.first_difference(expected), -1) << "q";
    EXPECT_EQ(first_difference(bits_of_scales(dpredicted.to_host<float>()), bits_of_scales(predicted)), -1);
    for (const DeviceBuffer* b : {&dx, &q, &dfactor, &dscale, &dpredicted}) EXPECT_TRUE(b->guards_intact());
  }
}

INSTANTIATE_TEST_SUITE_P(All, PredictGpu,
                         testing::Combine(testing::Values(DType::kBFloat16, DType::kFloat16),
                                          testing::ValuesIn(kShapes)));

}  // namespace
}  // namespace sparse24::test
