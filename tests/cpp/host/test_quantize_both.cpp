/// @file
/// quantize_fp8_both and transpose_fp8 on the CPU: small literals, and the codes of quantize_fp8 in both orders.
#include <gtest/gtest.h>

#include <vector>

#include "sparse24/quantize_both.h"
#include "support/array.h"

namespace sparse24 {
namespace {

using test::Array;
constexpr DType kFp8 = DType::kFloat8E4M3;

struct Both {
  Array q, qt;
  float scale = 0, amax = 0;
};

Both quantize_both(const Array& x, int64_t rows, int64_t cols, bool interleaved, const float* scale) {
  Both out{Array(kFp8, rows * cols), Array(kFp8, cols * round_up(rows, 32))};
  cpu::quantize_fp8_both(
      {x.data(), x.dtype(), rows, cols, interleaved, out.q.data(), out.qt.data(), scale, &out.scale, &out.amax});
  return out;
}

TEST(QuantizeBoth, SmallExample) {
  const Array x(DType::kFloat32, std::vector<double>{1, -2, 448, 1000, 0, 0.5, 3, -4, 5, 6});  // five rows of two
  const float one = 1;
  const Both out = quantize_both(x, 5, 2, /*interleaved=*/true, &one);
  EXPECT_EQ(out.q.numbers(), (std::vector<double>{1, -2, 448, 448, 0, 0.5, 3, -4, 5, 6}));
  EXPECT_EQ(out.amax, 1000);
  EXPECT_EQ(out.scale, 1);
  // A quarter of five rows is one: they come in their own order, and zeros behind them.
  for (int64_t i = 0; i < 64; ++i) EXPECT_EQ(out.qt[i], i % 32 < 5 ? out.q[i % 32 * 2 + i / 32] : 0) << i;
  Array again(kFp8, 2 * 32);
  cpu::transpose_fp8({out.q.data(), 5, 2, again.data()});
  EXPECT_EQ(again.first_difference(out.qt), -1);
}

TEST(QuantizeBoth, HasTheCodesOfQuantizeInTheOrderOfTheGroups) {
  constexpr int64_t kRows = 38, kCols = 16;
  const Array x = test::random_activations(DType::kBFloat16, kRows * kCols, 1);
  for (bool interleaved : {false, true}) {
    const Both out = quantize_both(x, kRows, kCols, interleaved, nullptr);
    Array expected(kFp8, kRows * kCols);
    float scale = 0;
    QuantizeArgs args{x.data(), x.dtype(), kRows, kCols, expected.data(), Scaling::kTensor, nullptr, &scale};
    cpu::quantize_fp8(args);
    EXPECT_EQ(out.scale, scale);
    EXPECT_EQ(out.q.first_difference(expected), -1);
    for (int64_t c = 0; c < kCols; ++c) {
      for (int64_t r = 0; r < 64; ++r) {
        const int64_t row = interleaved_token(r, interleaved ? kRows / 4 : 0);
        EXPECT_EQ(out.qt.code(c * 64 + r), r < kRows ? expected.code(row * kCols + c) : 0u) << r << ", " << c;
      }
    }
  }
}

/// What is packed is the pruned codes, whose transpose is written beside them.
TEST(QuantizeBoth, PacksWhatStaysOfColumns) {
  constexpr int64_t kRows = 48, kCols = 64;
  const Array x = test::random_activations(DType::kBFloat16, kRows * kCols, 2);
  QuantizeBothArgs args{};
  args.x = x.data();
  args.x_dtype = x.dtype();
  args.rows = kRows;
  args.cols = kCols;
  args.prunes = true;
  const auto run = [&](Array& q, std::vector<uint8_t>* meta) {
    Array qt(kFp8, kCols * args.ld_qt());
    float scale = 0, amax = 0;
    args.q = q.data();
    args.qt = qt.data();
    args.scale = &scale;
    args.amax = &amax;
    args.meta = meta ? meta->data() : nullptr;
    cpu::quantize_fp8_both(args);
    return qt;
  };
  Array dense(kFp8, kRows * kCols), packed(kFp8, kRows * kCols / 2);
  const Operand a = args.packed();
  std::vector<uint8_t> meta(static_cast<size_t>(a.meta_bytes()));
  const Array transposed = run(dense, nullptr);
  EXPECT_EQ(run(packed, &meta).first_difference(transposed), -1);
  for (int64_t m = 0; m < kRows; ++m) {
    for (int64_t g = 0; g < kCols / 4; ++g) {
      const int nibble = meta[static_cast<size_t>(a.meta_byte(m, g))] >> Operand::meta_shift(g) & 15;
      for (int i = 0; i < 4; ++i) {
        const bool first = (nibble & 3) == i, kept = first || nibble >> 2 == i;
        const uint32_t expected = kept ? packed.code(a.value_index(m, 2 * g + (first ? 0 : 1))) : 0u;
        EXPECT_EQ(dense.code(packed_feature(m) * kCols + 4 * g + i), expected) << m << ", " << g << ", " << i;
      }
    }
  }
}

}  // namespace
}  // namespace sparse24
