/// @file
/// mm on the device with every compiled configuration and layout, against the CPU reference.
///
/// Operands of small integers make every sum exact, so the results must agree in every bit. A second test with real
/// numbers bounds the error by what the tensor cores' accumulators can lose.
#include <tuple>

#include "sparse24/error.h"
#include "support/compressed.h"
#include "support/device_buffer.h"

namespace sparse24::test {
namespace {

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP32 = DType::kFloat32;
constexpr DType kFP8 = DType::kFloat8E4M3;

/// X [rows, cols] and the columns of B.
struct Problem {
  int64_t rows, cols, n;
};
void PrintTo(const Problem& p, std::ostream* out) { *out << p.rows << " x " << p.cols << ", N " << p.n; }

/// Few and many rows, odd N, K below, off and beyond the tile; columns are multiples of 32.
const Problem kProblems[] = {{1, 64, 7},      {63, 1856, 129}, {129, 32, 1000}, {300, 160, 264},
                             {520, 768, 520}, {5, 4096, 1},    {2047, 96, 136}};

int64_t aligned(int64_t elements, DType t) { return round_up(elements, 16 / size_of(t)); }

class MmGpu : public GpuTest {
 protected:
  /// B [k, n] from `numbers` (row-major), rows 16-byte aligned with NaN behind them, as p says.
  static Array layout_b(const Array& numbers, int64_t k, Product& p) {
    p.ldb = aligned(p.b_major == Major::kRow ? p.n : k, numbers.dtype());
    Array b(numbers.dtype(), p.ldb * (p.b_major == Major::kRow ? k : p.n));
    for (int64_t i = 0; i < k * p.n; ++i) {
      const int64_t row = i / p.n, col = i % p.n;
      b.set_code(p.b_major == Major::kRow ? row * p.ldb + col : col * p.ldb + row, numbers.code(i));
    }
    return b;
  }

  /// MmArgs::b_tail, its rows as far apart as those of b; empty where there is none.
  static Array b_tail(const Operand& a, const Array& b, const Product& p) {
    if (!p.interleaved || a.k % 4 == 0) return Array(b.dtype(), 0);
    const int64_t first = first_of_tail(a.k, meta_atom_k(a.dtype));
    Array out(b.dtype(), (a.k - first) * p.ldb);
    for (int64_t i = 0; i < out.size(); ++i) {
      out.set_code(i, b.code(interleaved_token(first + i / p.ldb, a.k / 4) * p.ldb + i % p.ldb));
    }
    return out;
  }

  /// The device's product with one configuration, or with the one it chooses.
  Array gpu_mm(const Compressed& a, const Array& b, const Product& p, const GemmConfig* config) {
    DeviceBuffer values(a.values), meta(a.meta), db(b), d(a.a.m * p.n * size_of(p.d_dtype));
    DeviceBuffer tail(b_tail(a.a, b, p));
    DeviceBuffer scale_a(p.scale_a), scale_b(p.scale_b), bias(p.bias ? *p.bias : Array(kFP32, 0));
    Array got(p.d_dtype, a.a.m * p.n);
    MmArgs args = mm_args(a, b, p, got);
    args.values = values.data();
    args.meta = meta.data<uint8_t>();
    args.b = db.data();
    if (p.interleaved && a.a.k % 4 != 0) {
      args.b_tail = tail.data();
      args.ldb_tail = p.ldb;
    }
    args.d = d.data();
    if (args.scale_a) args.scale_a = scale_a.data<float>();
    if (args.scale_b) args.scale_b = scale_b.data<float>();
    if (args.bias) args.bias = bias.data();
    const MmPlan plan = config ? cuda::plan_mm(args, *config) : cuda::plan_mm(args);
    DeviceBuffer workspace(plan.workspace_bytes);
    if (plan.workspace_bytes > 0) args.workspace = workspace.data<float>();
    uploads_done();
    cuda::mm(args, plan, stream_);
    synchronize();
    d.to_host(got);
    for (const DeviceBuffer* buffer : {&values, &meta, &db, &d, &scale_a, &scale_b, &bias, &workspace}) {
      EXPECT_TRUE(buffer->guards_intact());
    }
    return got;
  }

  /// Configurations of A's dtype, with both raster orders, and with K in parts where it can be cut.
  static std::vector<GemmConfig> configs(const Operand& a, const Product& p) {
    std::vector<GemmConfig> out;
    for (GemmConfig c : mm_configs(a.dtype)) {
      out.push_back(c);
      c.raster_along_m = !c.raster_along_m;
      c.swizzle = c.swizzle == 1 ? 8 : 1;
      out.push_back(c);
      if (a.m_contiguous() || p.d_major == Major::kColumn) continue;
      for (int splits : {2, 3, 8}) {
        if (!splits_evenly(c, a.k, splits)) continue;
        out.push_back(c);
        out.back().splits = splits;
      }
    }
    return out;
  }

  /// The same bits from each kernel that there is, and from the one that is chosen.
  void expect_of_every_configuration(const Compressed& a, const Array& b, const Product& p, const Array& expected) {
    for (const GemmConfig& config : configs(a.a, p)) {
      const Array got = gpu_mm(a, b, p, &config);
      const int64_t at = got.first_difference(expected);
      ASSERT_EQ(at, -1) << to_string(config) << ", D " << name_of(p.d_dtype)
                        << (p.d_major == Major::kRow ? " row" : " column") << "-major: got " << got[at] << ", expected "
                        << expected[at];
    }
    ASSERT_EQ(gpu_mm(a, b, p, nullptr).first_difference(expected), -1) << "own choice";
  }
};

using Layout = std::tuple<DType, Dim, Major, Problem>;
class MmLayoutsGpu : public MmGpu, public testing::WithParamInterface<Layout> {};

TEST_P(MmLayoutsGpu, EqualsTheReferenceOnIntegers) {
  const auto [dtype, dim, b_major, problem] = GetParam();
  const Array x = random_integers(dtype == kFP8 ? kBF16 : dtype, problem.rows * problem.cols, 3, 1);
  const Compressed a =
      cpu_compress(x, problem.rows, problem.cols, dtype, {dim, Activation::kNone, Scaling::kTensor, {1}});
  Product p(problem.n);
  p.b_major = b_major;
  const Array b = layout_b(random_integers(dtype, a.a.k * p.n, 3, 2), a.a.k, p);
  for (DType d_dtype : {kBF16, kFP16, kFP32}) {
    for (Major d_major : {Major::kRow, Major::kColumn}) {
      p.d_dtype = d_dtype;
      p.d_major = d_major;
      // Powers of two keep everything exact.
      p.scale_a.clear();
      p.scale_b.clear();
      p.bias.reset();
      if (d_dtype != kFP16) {
        for (int64_t i = 0; i < a.a.m; ++i) p.scale_a.push_back(std::ldexp(1.0f, static_cast<int>(i % 4) - 2));
        for (int64_t i = 0; i < p.n; ++i) p.scale_b.push_back(std::ldexp(1.0f, static_cast<int>(i % 3)));
        p.bias = random_integers(d_major == Major::kRow ? kFP32 : d_dtype, p.n, 9, 3);
      } else if (d_major == Major::kRow) {
        p.scale_a = {0.25f};
        p.scale_b = {2.0f};
      }
      ASSERT_NO_FATAL_FAILURE(expect_of_every_configuration(a, b, p, cpu_mm(a, b, p)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SixteenBitFeatures, MmLayoutsGpu,
                         testing::Combine(testing::Values(kBF16, kFP16), testing::Values(Dim::kFeatures),
                                          testing::Values(Major::kRow, Major::kColumn), testing::ValuesIn(kProblems)));
INSTANTIATE_TEST_SUITE_P(SixteenBitTokens, MmLayoutsGpu,
                         testing::Combine(testing::Values(kBF16, kFP16), testing::Values(Dim::kTokens),
                                          testing::Values(Major::kRow), testing::ValuesIn(kProblems)));
INSTANTIATE_TEST_SUITE_P(Fp8, MmLayoutsGpu,
                         testing::Combine(testing::Values(kFP8), testing::Values(Dim::kFeatures, Dim::kTokens),
                                          testing::Values(Major::kColumn), testing::ValuesIn(kProblems)));

/// Tokens off and on multiples of four, of the tile and of its metadata; features and N with tails.
const Problem kInterleaved[] = {{3, 64, 9},      {66, 32, 136}, {127, 160, 129},  {1031, 520, 520},
                                {4, 64, 7},      {8, 32, 136},  {36, 160, 129},   {64, 1856, 1000},
                                {300, 160, 264}, {512, 768, 8}, {1028, 520, 520}, {2048, 96, 136}};

class MmInterleavedGpu : public MmGpu, public testing::WithParamInterface<std::tuple<DType, Problem>> {};

TEST_P(MmInterleavedGpu, EqualsTheProductWithInterleavedRows) {
  const auto [dtype, problem] = GetParam();
  const Array x = random_integers(dtype, problem.rows * problem.cols, 3, 1);
  const Compressed a = cpu_compress(x, problem.rows, problem.cols, dtype, {Dim::kTokens});
  Product natural(problem.n), p(problem.n);
  p.interleaved = true;
  const Array numbers = random_integers(dtype, a.a.k * p.n, 3, 2);
  const Array b = layout_b(numbers, a.a.k, p);
  const Array ordered = interleave(numbers, a.a.k, p.n);
  for (DType d_dtype : {dtype, kFP32}) {
    for (Major d_major : {Major::kRow, Major::kColumn}) {
      natural.d_dtype = p.d_dtype = d_dtype;
      natural.d_major = p.d_major = d_major;
      ASSERT_NO_FATAL_FAILURE(expect_of_every_configuration(a, b, p, cpu_mm(a, ordered, natural)));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(SixteenBit, MmInterleavedGpu,
                         testing::Combine(testing::Values(kBF16, kFP16), testing::ValuesIn(kInterleaved)));

/// 128x256 tiles, more than 132 of them and of at least 16 K tiles, with vectors of 16 bits to store: the kernel whose
/// epilogue runs under the next tile's products.
using Operands = std::tuple<DType, Dim, Major>;
class MmOverlappedGpu : public MmGpu, public testing::WithParamInterface<Operands> {};

TEST_P(MmOverlappedGpu, EqualsTheReferenceOnIntegers) {
  const auto [dtype, dim, b_major] = GetParam();
  const int64_t m = 2104, k = dtype == kFP8 ? 2080 : 1040;
  const bool features = dim == Dim::kFeatures;
  const int64_t rows = features ? m : k, cols = features ? k : m;
  const Array x = random_integers(dtype == kFP8 ? kBF16 : dtype, rows * cols, 3, 1);
  const Compressed a = cpu_compress(x, rows, cols, dtype, {dim, Activation::kNone, Scaling::kTensor, {1}});
  Product p(1800);
  p.b_major = b_major;
  const Array numbers = random_integers(dtype, a.a.k * p.n, 3, 2);
  const Array b = layout_b(numbers, a.a.k, p);
  for (int64_t i = 0; i < m; ++i) p.scale_a.push_back(std::ldexp(1.0f, static_cast<int>(i % 4) - 2));
  p.bias = random_integers(kFP32, p.n, 9, 3);
  for (Major d_major : {Major::kRow, Major::kColumn}) {
    for (bool interleaved : {false, true}) {
      if (interleaved && (features || dtype == kFP8)) continue;
      p.d_dtype = dtype == kFP16 ? kFP16 : kBF16;
      p.d_major = d_major;
      p.interleaved = interleaved;
      Product rows_in_order = p;
      rows_in_order.b_major = Major::kRow;
      rows_in_order.ldb = 0;
      rows_in_order.interleaved = false;
      const Array expected = cpu_mm(a, interleaved ? interleave(numbers, a.a.k, p.n) : numbers, rows_in_order);
      for (GemmConfig config : mm_configs(dtype)) {
        if (config.tile != GemmTile::k128x256) continue;
        for (bool along_m : {true, false}) {
          config.raster_along_m = along_m;
          config.swizzle = along_m ? 1 : 8;
          ASSERT_EQ(gpu_mm(a, b, p, &config).first_difference(expected), -1)
              << to_string(config) << (d_major == Major::kRow ? ", D" : ", D.T")
              << (interleaved ? ", interleaved" : "");
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, MmOverlappedGpu,
    testing::Values(Operands{kBF16, Dim::kFeatures, Major::kColumn}, Operands{kBF16, Dim::kFeatures, Major::kRow},
                    Operands{kBF16, Dim::kTokens, Major::kRow}, Operands{kFP16, Dim::kFeatures, Major::kColumn},
                    Operands{kFP16, Dim::kTokens, Major::kRow}, Operands{kFP8, Dim::kFeatures, Major::kColumn},
                    Operands{kFP8, Dim::kTokens, Major::kColumn}));

class MmAccuracyGpu : public MmGpu, public testing::WithParamInterface<DType> {};

TEST_P(MmAccuracyGpu, LosesNoMoreThanTheAccumulatorsCan) {
  const DType dtype = GetParam();
  const int64_t m = 130, k = 512, n = 136;
  const Array x = random_activations(dtype == kFP8 ? kBF16 : dtype, m * k, 1, /*specials=*/false);
  const Compressed a = cpu_compress(x, m, k, dtype, {Dim::kFeatures, Activation::kRelu2});
  Product p(n);
  p.b_major = Major::kColumn;
  const Array b = layout_b(random_activations(dtype, k * n, 2, /*specials=*/false), k, p);
  const std::vector<double> dense = a.dense();
  // An instruction adds the products of 32 (fp8: 64) columns to a sum that keeps 23 bits (fp8: 13) below the largest
  // of them, and cuts off the rest.
  const double lost = dtype == kFP8 ? std::ldexp(k / 64 + 1, -13) : std::ldexp(k / 32 + 1, -22);
  const std::vector<double> columns = b.numbers();
  std::vector<double> sum(m * n, 0), magnitude(m * n, 0);
  for (int64_t i = 0; i < m * n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const double product = dense[i / n * k + j] * columns[i % n * p.ldb + j];
      sum[i] += product;
      magnitude[i] += std::fabs(product);
    }
  }
  for (const GemmConfig& config : configs(a.a, p)) {
    const Array got = gpu_mm(a, b, p, &config);
    for (int64_t i = 0; i < m * n; ++i) {
      ASSERT_LE(std::fabs(got[i] - sum[i]), lost * magnitude[i])
          << to_string(config) << ", row " << i / n << " column " << i % n;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, MmAccuracyGpu, testing::Values(kBF16, kFP16, kFP8),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_F(MmGpu, SplittingWhatCannotBeSplitIsRefused) {
  const Compressed a = cpu_compress(random_integers(kBF16, 64 * 192, 3, 1), 64, 192, kBF16);
  Product p(64);
  const Array b = layout_b(random_integers(kBF16, 192 * 64, 3, 2), 192, p);
  GemmConfig config = mm_configs(kBF16).front();
  config.splits = 2;  // 192 columns are three tiles
  EXPECT_THROW(gpu_mm(a, b, p, &config), Error);
  config.splits = 3;
  EXPECT_EQ(gpu_mm(a, b, p, &config).first_difference(cpu_mm(a, b, p)), -1);
  p.d_major = Major::kColumn;
  EXPECT_THROW(gpu_mm(a, b, p, &config), Error);
}

TEST_F(MmGpu, WithoutReductionIsRefused) {
  const Compressed a = cpu_compress(Array(kBF16, 0), 5, 0, kBF16);
  EXPECT_THROW(gpu_mm(a, Array(kBF16, 0), Product(3), nullptr), Error);
}

TEST_F(MmGpu, WithoutRowsOrColumnsNothingIsWritten) {
  const Compressed none = cpu_compress(Array(kBF16, 0), 0, 64, kBF16);
  EXPECT_EQ(gpu_mm(none, Array(kBF16, 64), Product(1), nullptr).size(), 0);
  const Compressed some = cpu_compress(random_integers(kBF16, 2 * 64, 3, 1), 2, 64, kBF16);
  EXPECT_EQ(gpu_mm(some, Array(kBF16, 0), Product(0), nullptr).size(), 0);
}

TEST_F(MmGpu, WhatNoKernelInterleavesIsRefused) {
  Product p(64);
  p.interleaved = true;
  MmArgs without_tail{};
  without_tail.a = Operand::of(66, 64, kBF16, Dim::kTokens);
  without_tail.n = 64;
  without_tail.b_major = Major::kRow;
  without_tail.b_interleaved = true;
  EXPECT_THROW(cuda::mm(without_tail, stream_), Error);
  const Compressed features = cpu_compress(random_integers(kBF16, 64 * 64, 3, 1), 64, 64, kBF16);
  const Array b = layout_b(random_integers(kBF16, 64 * 64, 3, 2), 64, p);
  EXPECT_THROW(gpu_mm(features, b, p, nullptr), Error);
}

TEST_F(MmGpu, ALayoutWithoutKernelIsRefused) {
  const Compressed a = cpu_compress(random_integers(kBF16, 64 * 64, 3, 1), 64, 64, kBF16, {Dim::kTokens});
  Product p(64);
  p.b_major = Major::kColumn;
  const Array b = layout_b(random_integers(kBF16, 64 * 64, 3, 2), 64, p);
  EXPECT_THROW(gpu_mm(a, b, p, nullptr), Error);
}

}  // namespace
}  // namespace sparse24::test
