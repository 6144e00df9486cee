// The GEMM of linear_gradient for Hopper: dy = grad [M, K] @ w [K, N], w MN-major as nn.Linear stores it.
#pragma once

#include "gemm/linear_gradient_launchers.h"
#include "gemm/sm90/epilogues/gradient.cuh"
#include "gemm/sm90/mainloops/grouped_rows.cuh"
#include "gemm/sm90/ops/dense.cuh"

namespace sparse24::cuda {

template <DType kDType, DType kMeta, bool kCounts>
struct LinearGradientSm90 {
  using Tile = DenseTile<kLinearGradientTile>;
  using Epilogue =
      GradientEpilogue<typename CudaType<kDType>::type, kMeta == DType::kFloat8E4M3, kCounts, Tile::kM, Tile::kN>;
  using Gemm =
      DenseSm90<kDType, Major::kRow, Tile,
                cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<Epilogue>, GroupedRowsMainloop>;
};

template <DType kDType, DType kMeta, bool kCounts>
void launch_linear_gradient_sm90(const LinearGradientArgs& args, const GemmConfig& config, cudaStream_t stream) {
  const GradientParams<typename CudaType<kDType>::type> epilogue{
      int(args.tokens),
      int(args.features),
      args.y,
      args.meta,
      args.dh,
      {{args.y_tokens.values, args.y_tokens.meta}, {args.dh_tokens.values, args.dh_tokens.meta}},
      args.counts,
      int(args.quarter()),
      args.roots,
      args.hot_count > 0 ? args.hot_slots : nullptr,
      {args.y_hot, args.dh_hot}};
  // Rows of grad between the tokens of a group, and between groups.
  const bool apart = args.interleaved;
  const RowOrder order{apart ? std::max<int64_t>(args.quarter(), 1) : 1, apart ? 1 : 4, int(args.features),
                       args.grad_tail};
  // Beyond K both operands read as zeros, whatever lies between the rows of grad.
  const int64_t columns = round_up(args.features, kMetaRowPadding);  // metadata has its padding
  const DenseProduct product{args.tokens, columns, args.in, args.grad, args.ld_grad, args.w, args.features};
  LinearGradientSm90<kDType, kMeta, kCounts>::Gemm::launch(product, config, epilogue, stream,
                                                           "sparse24.linear_gradient: launch", order);
}

}  // namespace sparse24::cuda
