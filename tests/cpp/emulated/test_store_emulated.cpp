/// @file
/// The epilogue of mm on the host, for every tile, output type and layout, against the CPU reference.
#include <gtest/gtest.h>

#include "emulator/epilogue.h"
// After it.
#include "emulator/sums.h"
#include "gemm/sm90/epilogues/store_steps.cuh"
#include "support/compressed.h"

namespace sparse24::emulate {
namespace {

using cuda::StoreParams;
using test::Array;

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP16 = DType::kFloat16;
constexpr DType kFP32 = DType::kFloat32;

/// D [rows, cols], `shift` elements off its alignment.
struct Case {
  int rows, cols;
  DType dtype;
  Major major = Major::kRow;
  Scales given = Scales::kNone;
  int shift = 0;

  int64_t ld() const { return major == Major::kRow ? cols : rows; }
  int64_t index(int m, int n) const { return major == Major::kRow ? m * ld() + n : n * ld() + m; }
};
void PrintTo(const Case& c, std::ostream* out) {
  *out << name_of(c.dtype) << " " << c.rows << " x " << c.cols << (c.major == Major::kRow ? "" : ", transposed")
       << ", scales " << static_cast<int>(c.given) << ", shift " << c.shift;
}

/// The bias is fp32 beside single scales, otherwise of D's type.
struct Operands {
  explicit Operands(const Case& c) : scale_a(scales(c.given, c.rows, 5)), scale_b(scales(c.given, c.cols, 3)) {
    if (c.given != Scales::kNone) {
      bias = test::random_integers(c.given == Scales::kEach ? c.dtype : kFP32, c.cols, 9, 1);
    }
  }
  std::vector<float> scale_a, scale_b;
  std::optional<Array> bias;
};

/// Row m of D by the reference, as the product of (1, 0, 0, 0) with a B whose first row it is: exact, and NaN stays
/// where it is.
Array reference_row(const Case& c, const Operands& operands, const Sums& sums, int m) {
  test::Compressed a(1, 4, kFP32, Dim::kFeatures);
  a.values = Array(kFP32, {1., 0.});
  std::fill(a.meta.begin(), a.meta.end(), kMetaPaddingByte);
  Array b(kFP32, 4 * c.cols);
  std::memset(b.data(), 0, b.bytes());
  std::memcpy(b.data(), sums.row(m).data(), c.cols * sizeof(float));
  test::Product product(c.cols);
  product.d_dtype = c.dtype;
  if (c.given != Scales::kNone) product.scale_a = {operands.scale_a[m % operands.scale_a.size()]};
  product.scale_b = operands.scale_b;
  product.bias = operands.bias;
  return test::cpu_mm(a, b, product);
}

StoreParams params_of(const Case& c, const Operands& operands, void* d) {
  StoreParams p{};
  p.d = d;
  p.ldd = c.ld();
  p.d_dtype = c.dtype;
  p.transposed = c.major == Major::kColumn;
  p.vectorised = c.dtype == kFP32 ? !p.transposed && c.ld() % 2 == 0 && reinterpret_cast<uintptr_t>(d) % 8 == 0
                                  : c.ld() % 8 == 0 && reinterpret_cast<uintptr_t>(d) % 16 == 0;
  if (c.given == Scales::kNone) return p;
  p.scale_a = operands.scale_a.data();
  p.scale_b = operands.scale_b.data();
  p.scale_a_stride = c.given == Scales::kEach;
  p.scale_b_stride = c.given == Scales::kEach;
  p.bias = operands.bias->data();
  p.bias_dtype = operands.bias->dtype();
  return p;
}

/// "" if D is the reference's after run(params, sums), and nothing beside it is written.
template <class Run>
std::string difference_of(const Case& c, const Run& run) {
  const Operands operands(c);
  const Sums sums(c.rows, c.cols, /*specials=*/c.given == Scales::kNone);
  const int64_t before = c.shift * size_of(c.dtype);
  Guarded d(before + c.rows * c.cols * size_of(c.dtype));
  const auto p = params_of(c, operands, d.data<char>() + before);
  run(p, sums);
  Array got(c.dtype, int64_t{c.rows} * c.cols);
  std::memcpy(got.data(), p.d, got.bytes());
  for (int m = 0; m < c.rows; ++m) {
    const Array row = reference_row(c, operands, sums, m);
    for (int n = 0; n < c.cols; ++n) {
      if (got.code(c.index(m, n)) == row.code(n)) continue;
      return testing::PrintToString(c) + ": d[" + std::to_string(m) + ", " + std::to_string(n) + "] is " +
             std::to_string(got[c.index(m, n)]) + ", not " + std::to_string(row[n]);
    }
  }
  return d.intact() ? "" : "guards of " + testing::PrintToString(c);
}

/// Of both kernels: for row-major and for K-major B.
template <class Tile>
std::string difference(const Case& c, Order order) {
  const auto with = [&](auto permuted) {
    return difference_of(c, [&](const StoreParams& p, const Sums& sums) {
      using Epilogue = cuda::StoreEpilogue<Tile::kM, Tile::kN, decltype(permuted)::value>;
      run_epilogue<Epilogue, Tile>(p, c.rows, c.cols, sums, order);
    });
  };
  const std::string of_rows = with(std::false_type{}), of_columns = with(std::true_type{});
  return of_rows + (of_columns.empty() ? "" : "K-major B: " + of_columns);
}

template <class Tile>
class StoreEmulated : public testing::Test {};

using Tiles = testing::Types<Tile<128, 256, Schedule::kCooperative, true>, Tile<256, 192, Schedule::kCooperative, true>,
                             Tile<128, 128, Schedule::kCooperative, true>, Tile<64, 128, Schedule::kPingpong, true>,
                             Tile<64, 64, Schedule::kPingpong, true>>;
struct TileName {
  template <class Tile>
  static std::string GetName(int) {
    return std::to_string(Tile::kM) + "x" + std::to_string(Tile::kN);
  }
};
TYPED_TEST_SUITE(StoreEmulated, Tiles, TileName);

/// One row and column, tails of all tiles in both, whole tiles; lengths that suit vectors and such that do not.
constexpr int kSizes[][2] = {{1, 8}, {8, 1}, {127, 64}, {129, 264}, {264, 129}, {256, 768}};

TYPED_TEST(StoreEmulated, EqualsTheReference) {
  for (const auto& [rows, cols] : kSizes) {
    for (DType dtype : {kBF16, kFP16, kFP32}) {
      for (Major major : {Major::kRow, Major::kColumn}) {
        ASSERT_EQ(difference<TypeParam>({rows, cols, dtype, major, Scales::kEach}, Order::kForward), "");
      }
    }
  }
}

TYPED_TEST(StoreEmulated, TakesScalesAndBiasOrNone) {
  for (DType dtype : {kBF16, kFP16, kFP32}) {
    for (Scales given : {Scales::kNone, Scales::kOne}) {
      ASSERT_EQ(difference<TypeParam>({129, 264, dtype, Major::kRow, given}, Order::kForward), "");
    }
  }
}

TYPED_TEST(StoreEmulated, DoesNotNeedAlignment) {
  for (DType dtype : {kBF16, kFP16, kFP32}) {
    for (Major major : {Major::kRow, Major::kColumn}) {
      ASSERT_EQ(difference<TypeParam>({136, 264, dtype, major, Scales::kEach, /*shift=*/1}, Order::kForward), "");
    }
  }
}

TYPED_TEST(StoreEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) {
    for (Major major : {Major::kRow, Major::kColumn}) {
      ASSERT_EQ(difference<TypeParam>({300, 992, kBF16, major, Scales::kEach}, order), "");
    }
  }
}

/// Sums of parts of K, as mm leaves them for a second kernel: batches of rows longer than those of D.
TYPED_TEST(StoreEmulated, KeepsBatchesApart) {
  constexpr int kRows = 130, kCols = 261, kLd = 264, kBatches = 3;
  const Sums sums(kRows, kCols);
  Guarded d(kBatches * kRows * kLd * sizeof(float));
  StoreParams p{};
  p.d = d.data();
  p.ldd = kLd;
  p.d_dtype = kFP32;
  p.vectorised = true;
  run_epilogue<cuda::StoreEpilogue<TypeParam::kM, TypeParam::kN, true>, TypeParam>(p, kRows, kCols, sums,
                                                                                   Order::kForward, kBatches);
  for (int batch = 0; batch < kBatches; ++batch) {
    for (int m = 0; m < kRows; ++m) {
      const float* row = d.data<float>() + (batch * kRows + m) * kLd;
      ASSERT_EQ(std::vector<float>(row, row + kCols), sums.row(m, batch)) << "batch " << batch << ", row " << m;
    }
  }
  EXPECT_TRUE(d.intact());
}

/// The epilogue in steps, for what it takes: D of 16 bits in vectors, row-major if B is K-major.
template <bool kPermutedN>
std::string difference_of_steps(const Case& c, Order order = Order::kForward) {
  return difference_of(c, [&](const StoreParams& p, const Sums& sums) {
    ASSERT_TRUE(kPermutedN ? p.permutes_n() : p.in_steps());
    using Steps = cuda::StoreSteps<128, 256, kPermutedN>;
    run_epilogue<Steps, Tile<128, 256, Schedule::kOverlapped, true>>({p, c.rows, c.cols}, c.rows, c.cols, sums, order);
  });
}

/// Both kinds, and D.T.
std::string difference_of_all_steps(Case c, Order order = Order::kForward) {
  std::string found = difference_of_steps<true>(c, order) + difference_of_steps<false>(c, order);
  std::swap(c.rows, c.cols);
  c.major = Major::kColumn;
  return found + difference_of_steps<false>(c, order);
}

TEST(StoreStepsEmulated, EqualTheReference) {
  for (const auto& [rows, cols] : {std::pair{1, 8}, {127, 64}, {129, 264}, {264, 520}}) {
    for (DType dtype : {kBF16, kFP16}) {
      ASSERT_EQ(difference_of_all_steps({rows, cols, dtype, Major::kRow, Scales::kEach}), "");
    }
  }
}

TEST(StoreStepsEmulated, TakeScalesAndBiasOrNone) {
  for (Scales given : {Scales::kNone, Scales::kOne}) {
    ASSERT_EQ(difference_of_all_steps({129, 264, kBF16, Major::kRow, given}), "");
  }
}

TEST(StoreStepsEmulated, DoNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders)
    ASSERT_EQ(difference_of_all_steps({140, 264, kBF16, Major::kRow, Scales::kEach}, order), "");
}

}  // namespace
}  // namespace sparse24::emulate
