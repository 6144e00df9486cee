/// @file
/// The core's number conversions against the definition of each format (array.h).
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "reference/numeric.h"
#include "support/array.h"

namespace sparse24::test {
namespace {

/// Every float that is interesting for rounding to T: each number, each midpoint, the floats beside them; and random
/// ones.
std::vector<float> hard_floats(DType t) {
  std::vector<float> out{0.0f, INFINITY, 1e-45f, 1e-38f, 3.4e38f};
  const uint32_t codes = format_of(t).first_special;
  for (uint32_t code = 0; code < codes; ++code) {
    const double here = decode(t, code), next = decode(t, code + 1 < codes ? code + 1 : code);
    for (double v : {here, (here + next) / 2}) {
      const float f = static_cast<float>(v);
      for (float g : {f, std::nextafterf(f, INFINITY), std::nextafterf(f, 0.0f)}) out.push_back(g);
    }
  }
  std::mt19937 random(7);
  for (int i = 0; i < 100000; ++i) {
    const float f = float_of(random() & 0x7FFFFFFF);
    if (!std::isnan(f)) out.push_back(f);
  }
  return out;
}

template <class Narrow, class Round>
void expect_rounding(DType t, Round round) {
  for (float f : hard_floats(t)) {
    for (float x : {f, -f}) {
      ASSERT_EQ(static_cast<uint32_t>(static_cast<Narrow>(round(x))), encode(t, x)) << name_of(t) << " of " << x;
    }
  }
}

TEST(Numeric, RoundToBfloat16) { expect_rounding<uint16_t>(DType::kBFloat16, float_to_bfloat16); }
TEST(Numeric, RoundToFloat16) { expect_rounding<uint16_t>(DType::kFloat16, float_to_float16); }
TEST(Numeric, RoundToE4M3) { expect_rounding<uint8_t>(DType::kFloat8E4M3, float_to_e4m3); }

TEST(Numeric, NaNIsCanonical) {
  for (uint32_t bits : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0xFFFFFFFFu}) {
    EXPECT_EQ(float_to_bfloat16(float_of(bits)), 0x7FFF);
    EXPECT_EQ(float_to_float16(float_of(bits)), 0x7FFF);
    EXPECT_EQ(float_to_e4m3(float_of(bits)), 0x7F);
  }
}

template <class Widen>
void expect_widening(DType t, Widen widen) {
  const uint32_t codes = 1u << (8 * size_of(t));
  for (uint32_t code = 0; code < codes; ++code) {
    const float wide = widen(static_cast<uint16_t>(code));
    const double number = decode(t, code);
    if (std::isnan(number)) {
      ASSERT_TRUE(std::isnan(wide)) << name_of(t) << " code " << code;
      continue;
    }
    const bool infinite = t != DType::kFloat8E4M3 && (code & (codes / 2 - 1)) == format_of(t).first_special;
    ASSERT_EQ(wide, infinite ? std::copysign(INFINITY, static_cast<float>(number)) : static_cast<float>(number))
        << name_of(t) << " code " << code;
    ASSERT_EQ(std::signbit(wide), std::signbit(number)) << name_of(t) << " code " << code;
  }
}

TEST(Numeric, WidenBfloat16) { expect_widening(DType::kBFloat16, bfloat16_to_float); }
TEST(Numeric, WidenFloat16) { expect_widening(DType::kFloat16, float16_to_float); }
TEST(Numeric, WidenE4M3) {
  expect_widening(DType::kFloat8E4M3, [](uint16_t code) { return e4m3_to_float(static_cast<uint8_t>(code)); });
}

}  // namespace
}  // namespace sparse24::test
