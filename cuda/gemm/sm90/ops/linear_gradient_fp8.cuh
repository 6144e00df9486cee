// The GEMM of linear_gradient_fp8 for Hopper: dy = grad [M, K] @ w.T, w [N, K], both K-major as float8 has to be.
#pragma once

#include "gemm/linear_gradient_fp8_launchers.h"
#include "gemm/sm90/epilogues/gradient_fp8.cuh"
#include "gemm/sm90/mainloops/grouped_rows.cuh"
#include "gemm/sm90/ops/dense.cuh"

namespace sparse24::cuda {

template <DType kDType>
struct LinearGradientFp8Sm90 {
  using Tile = DenseTile<kLinearGradientTile>;
  using Epilogue = GradientFp8Epilogue<Tile::kM, Tile::kN>;
  using Gemm =
      DenseSm90<kDType, Major::kColumn, Tile,
                cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Epilogue>, GroupedRowsMainloop>;
};

template <DType kDType>
void launch_linear_gradient_fp8_sm90(const LinearGradientFp8Args& args, const GemmConfig& config, cudaStream_t stream) {
  // Rows of grad between the tokens of a group, and between groups.
  const bool apart = args.interleaved;
  const RowOrder order{apart ? std::max<int64_t>(args.quarter(), 1) : 1, apart ? 1 : 4, int(args.features),
                       args.grad_tail};
  const int64_t columns = round_up(args.features, kMetaRowPadding);  // metadata has its padding
  const DenseProduct product{args.tokens, columns, args.in, args.grad, args.ld_grad, args.w, args.in};
  LinearGradientFp8Sm90<kDType>::Gemm::launch(product, config, GradientFp8Params::of(args), stream,
                                              "sparse24.linear_gradient_fp8: launch", order);
}

}  // namespace sparse24::cuda
