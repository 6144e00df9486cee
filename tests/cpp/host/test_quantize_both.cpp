/// @file
/// quantize_fp8_both on the CPU: small literals, and the codes of quantize_fp8 in both orders.
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

}  // namespace
}  // namespace sparse24
