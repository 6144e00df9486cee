/// @file
/// Cases for the epilogues of linear_relu2 and linear_compress: accumulators, and the reference's results of them.
#pragma once

#include <gtest/gtest.h>

#include "emulator/epilogue.h"
// After it.
#include "emulator/sums.h"
#include "gemm/sm90/epilogues/linear.cuh"
#include "support/linear_case.h"

namespace sparse24::emulate {

using test::LinearCase;
using test::OutScale;

/// h [tokens, out]; x and w, which the epilogue never sees, are empty.
struct EpilogueCase {
  int tokens, out;
  DType pre_activation;
  OutScale out_scale = OutScale::kNone;  ///< none: y is of the type of h, otherwise fp8
  Scales given = Scales::kEach;
  bool specials = false;   ///< NaN and infinities
  bool statistics = true;  ///< amax and saturated are wanted
  ActivationArgs activation = Activation::kRelu2;

  LinearCase linear() const {
    LinearCase c(tokens, 0, out, test::Array(DType::kFloat32, 0), test::Array(DType::kFloat32, 0));
    c.hidden_dtype = c.y_dtype = pre_activation;
    c.scale_x = scales(given, tokens, 5);
    c.scale_w = scales(given, out, 3);
    if (given != Scales::kNone) c.bias = test::random_integers(pre_activation, out, 9, 1);
    c.scale_output(out_scale);
    c.activation = activation;
    return c;
  }
  Sums sums() const { return {tokens, out, specials}; }
};
inline void PrintTo(const EpilogueCase& c, std::ostream* out) {
  *out << name_of(c.pre_activation) << " " << c.tokens << " x " << c.out << ", scale of y "
       << static_cast<int>(c.out_scale) << ", scales " << static_cast<int>(c.given) << (c.specials ? ", specials" : "")
       << (c.statistics ? ", statistics" : "") << (c.activation.kind == Activation::kRelu ? ", roots" : "")
       << ", threshold " << c.activation.threshold;
}

/// One token of a case for the reference: x = 1 and w = its accumulators, so that they reach h unchanged, NaN included.
inline LinearCase token_case(const LinearCase& all, const Sums& sums, int token) {
  test::Array x(DType::kFloat32, std::vector<double>{1}), w(DType::kFloat32, all.out);
  std::memcpy(w.data(), sums.row(token).data(), w.bytes());
  LinearCase c(1, 1, all.out, std::move(x), std::move(w));
  const auto of_token = [&](const std::vector<float>& scale) {
    return scale.empty() ? scale : std::vector<float>{scale[token % scale.size()]};
  };
  c.hidden_dtype = all.hidden_dtype;
  c.y_dtype = all.y_dtype;
  c.scale_x = of_token(all.scale_x);
  c.scale_w = all.scale_w;
  c.scale_y = of_token(all.scale_y);
  c.bias = all.bias;
  c.activation = all.activation;
  return c;
}

/// Those of all tokens, from those of each.
inline void add(test::LinearStatistics& sum, const test::LinearStatistics& token) {
  sum.amax = std::max(sum.amax, token.amax);
  sum.saturated += token.saturated;
}
inline void expect_equal(const test::LinearStatistics& got, const test::LinearStatistics& expected) {
  EXPECT_EQ(got.amax, expected.amax);
  EXPECT_EQ(got.saturated, expected.saturated);
}

/// What linear_compress makes of a case, token by token; the metadata has its rows in tiles.
inline test::CompressedResult compressed_reference(const LinearCase& c, DType meta_dtype, const Sums& sums) {
  test::CompressedResult all(c, meta_dtype);
  std::fill(all.meta.begin(), all.meta.end(), kMetaPaddingByte);
  for (int t = 0; t < c.tokens; ++t) {
    const test::CompressedResult token = cpu_linear_compress(token_case(c, sums, t), meta_dtype);
    const int64_t bytes = token.values.bytes();
    std::memcpy(static_cast<char*>(all.values.data()) + t * bytes, token.values.data(), bytes);
    for (int64_t g = 0; g < all.a.k_meta / 4; g += 2)
      all.meta[all.a.meta_byte(t, g)] = token.meta[token.a.meta_byte(0, g)];
    add(all, token);
  }
  return all;
}

/// The case's arguments for an epilogue that writes `statistics`, if there are any.
inline cuda::LinearParams params_of(const LinearCase& c, test::LinearStatistics* statistics) {
  LinearArgs args = c.args();
  if (statistics) {
    args.amax = &statistics->amax;
    args.saturated = &statistics->saturated;
  }
  return cuda::LinearParams::of(args);
}

/// A kernel of the first GEMM: its tile, and the type that h is rounded to.
template <int kM, int kN, Schedule kSchedule, DType kPreActivation_, class PreActivation_>
struct LinearKernel {
  using Tile = emulate::Tile<kM, kN, kSchedule>;
  using PreActivation = PreActivation_;
  static constexpr DType kPreActivation = kPreActivation_;
  /// An epilogue in steps, as this kernel hosts it.
  template <class Steps>
  using Hosted = std::conditional_t<kSchedule == Schedule::kOverlapped, Steps, cuda::AtOnce<Steps>>;
};
using LinearKernels = testing::Types<LinearKernel<128, 64, Schedule::kPingpong, DType::kBFloat16, __nv_bfloat16>,
                                     LinearKernel<128, 128, Schedule::kPingpong, DType::kBFloat16, __nv_bfloat16>,
                                     LinearKernel<128, 192, Schedule::kPingpong, DType::kBFloat16, __nv_bfloat16>,
                                     LinearKernel<128, 128, Schedule::kPingpong, DType::kFloat16, __half>,
                                     LinearKernel<128, 256, Schedule::kOverlapped, DType::kBFloat16, __nv_bfloat16>,
                                     LinearKernel<128, 256, Schedule::kOverlapped, DType::kFloat16, __half>>;
struct LinearKernelName {
  template <class Kernel>
  static std::string GetName(int) {
    return std::to_string(Kernel::Tile::kM) + "x" + std::to_string(Kernel::Tile::kN) + "_" +
           name_of(Kernel::kPreActivation);
  }
};

}  // namespace sparse24::emulate
