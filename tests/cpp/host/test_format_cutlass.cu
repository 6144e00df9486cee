/// @file
/// format.h against the layouts that CUTLASS's own sm90 sparse kernels read.
#include <gtest/gtest.h>

#include <tuple>

#include "cutlass/bfloat16.h"
#include "cutlass/float8.h"
#include "cutlass/gemm/collective/builders/sm90_sparse_config.inl"
#include "sparse24/format.h"

namespace sparse24 {
namespace {

using cute::GMMA::Major;

template <class Element, Major major, int atom_k>
using Config = cutlass::Sm90GemmSparseConfig<cute::sparse_elem<2, Element>, major, cute::sparse_elem<8, uint8_t>,
                                             cute::Int<atom_k>>;
using BF16Features = Config<cutlass::bfloat16_t, Major::K, 64>;
using BF16Tokens = Config<cutlass::bfloat16_t, Major::MN, 64>;
using FP8 = Config<cutlass::float_e4m3_t, Major::K, 128>;

class FormatCutlass : public testing::TestWithParam<std::tuple<int, int>> {
 protected:
  const int rows_ = std::get<0>(GetParam()), cols_ = std::get<1>(GetParam());
};

/// CUTLASS's E layout gives one bit per logical element: the first element of a group is the offset of its nibble.
template <class SparseConfig>
void compare_meta(const Operand& a) {
  const auto layout =
      SparseConfig::fill_layoutE(cute::make_tuple(static_cast<int>(a.m_meta), 8, static_cast<int>(a.k), 1));
  ASSERT_EQ(int64_t{cute::cosize(layout)}, 8 * a.meta_bytes());
  for (int row = 0; row < a.m_meta; ++row) {
    for (int g = 0; g < a.k_meta / 4; ++g) {
      const int64_t bit = layout(row, 4 * g, 0);
      ASSERT_EQ(8 * a.meta_byte(row, g) + Operand::meta_shift(g), bit) << "row " << row << " group " << g;
    }
  }
}

/// CUTLASS's A layout counts logical elements, of which two share one stored value.
template <class SparseConfig>
void compare_values(const Operand& a) {
  const auto layout =
      SparseConfig::fill_layoutA(cute::make_tuple(static_cast<int>(a.m), 8, static_cast<int>(a.k_values), 1));
  ASSERT_EQ(int64_t{cute::size(layout)}, a.m * a.k_values);
  for (int row = 0; row < a.m; ++row) {
    for (int j = 0; j < a.k_values / 2; ++j) {
      ASSERT_EQ(a.value_index(row, j), int64_t{layout(row, 2 * j, 0)} / 2) << "row " << row << " value " << j;
    }
  }
}

TEST_P(FormatCutlass, BF16AlongFeatures) {
  const Operand a = Operand::of(rows_, cols_, DType::kBFloat16, Dim::kFeatures);
  compare_meta<BF16Features>(a);
  compare_values<BF16Features>(a);
}

TEST_P(FormatCutlass, BF16AlongTokens) {
  const Operand a = Operand::of(rows_, cols_, DType::kBFloat16, Dim::kTokens);
  compare_meta<BF16Tokens>(a);
  compare_values<BF16Tokens>(a);
}

TEST_P(FormatCutlass, FP8AlongFeatures) {
  const Operand a = Operand::of(rows_, cols_, DType::kFloat8E4M3, Dim::kFeatures);
  compare_meta<FP8>(a);
  compare_values<FP8>(a);
}

TEST_P(FormatCutlass, FP8AlongTokens) {
  const Operand a = Operand::of(rows_, cols_, DType::kFloat8E4M3, Dim::kTokens);
  compare_meta<FP8>(a);
  compare_values<FP8>(a);
}

TEST(FormatCutlassAlignment, IsTheSame) {
  EXPECT_EQ(feature_alignment(DType::kBFloat16, Dim::kFeatures), int{BF16Features::TensorAAlignmentK{}});
  EXPECT_EQ(feature_alignment(DType::kBFloat16, Dim::kTokens), int{BF16Tokens::TensorAAlignmentM{}});
  EXPECT_EQ(feature_alignment(DType::kFloat8E4M3, Dim::kFeatures), int{FP8::TensorAAlignmentK{}});
  EXPECT_EQ(token_padding(DType::kBFloat16), int{BF16Tokens::TensorAAlignmentK{}});
  EXPECT_EQ(token_padding(DType::kFloat8E4M3), int{FP8::TensorAAlignmentK{}});
  EXPECT_EQ(meta_atom_k(DType::kBFloat16), int{BF16Features::TensorEAlignmentK{}});
  EXPECT_EQ(meta_atom_k(DType::kFloat8E4M3), int{FP8::TensorEAlignmentK{}});
  EXPECT_EQ(kMetaRowPadding % int{FP8::TensorEAlignmentM{}}, 0);
}

INSTANTIATE_TEST_SUITE_P(Shapes, FormatCutlass,
                         testing::Values(std::tuple{4, 32}, std::tuple{5, 96}, std::tuple{64, 64}, std::tuple{127, 160},
                                         std::tuple{193, 1856}, std::tuple{300, 352}, std::tuple{3, 15680}));

}  // namespace
}  // namespace sparse24
