// The GEMM of linear_gradient with a 2:4 weight for Hopper. wgmma's sparse operand is A, so that the product is dy.T
// [N, M] = w.T [N, K] @ grad.T, in pingpong, with an epilogue whose rows are features.
#pragma once

#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/persistent.cuh"
#include "gemm/sm90/mainloops/grouped_sparse.cuh"
#include "gemm/sm90/ops/dense.cuh"
#include "gemm/sm90/schedulers/wave_scheduler.cuh"
#include "gemm/tuning.h"
#include "sparse24/linear.h"

namespace sparse24::cuda {

inline constexpr TileSpec kGradientPackedTile = dense_tile(GemmTile::k128x192);
inline constexpr int kGradientPackedM = kGradientPackedTile.m, kGradientPackedN = kGradientPackedTile.n;

// Its order of tiles, which is within 2 % of the best of seven (docs/log/101-one-warpgroup-a-tile.md); the variable
// changes it.
inline GemmConfig grouped_config(DType dtype) {
  GemmConfig config = config_of(kGradientPackedTile, dtype);
  config.swizzle = 8;
  if (const auto wanted = tuning_override("SPARSE24_LINEAR_CONFIG", {config, config})) config = *wanted;
  return config;
}

// EpilogueOp: of tiles of kGradientPackedM features and kGradientPackedN tokens.
template <DType kDType, class EpilogueOp>
struct GradientPackedSm90 {
  using Element = typename GemmElement<kDType>::type;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<EpilogueOp>;
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * 16 / sizeof(Element), Element, cutlass::layout::ColumnMajor, 16 / sizeof(Element), float,
      cute::Shape<cute::Int<kGradientPackedM>, cute::Int<kGradientPackedN>, cute::Int<int(meta_atom_k(kDType))>>,
      cute::Shape<cute::_2, cute::_1, cute::_1>, GemmStages<Epilogue>,
      GemmSchedule<kDType == DType::kFloat8E4M3, /*kPingpong=*/true>>::CollectiveOp;
  using Mainloop = GroupedSparseMainloop<Base, /*kGroupsTokens=*/true>;
  using Kernel = PersistentGemm<Mainloop, Epilogue, WaveScheduler<2, 1>>;
  using SparseConfig = typename Mainloop::SparseConfig;

  // Args: of linear_gradient or of linear_gradient_fp8.
  template <class Args>
  static void launch(const Args& args, const uint8_t* w_meta, const typename Epilogue::Params& epilogue,
                     const GemmConfig& config, cudaStream_t stream, const char* what) {
    const Operand w = Operand::of(args.features, args.in, kDType, Dim::kFeatures);
    // Tiles cover the metadata's padding, of tokens too.
    const int m = int(w.m), n = int(round_up(args.tokens, meta_atom_k(kDType))), k = int(w.k);
    typename Mainloop::StrideB stride_b{};
    cute::get<0>(stride_b) = args.ld_grad;
    typename Kernel::Arguments arguments{{m, n, k, 1}, {}, epilogue, config};
    // The metadata is described by its padded sizes.
    static_cast<typename Base::Arguments&>(arguments.mainloop) = {
        static_cast<typename Mainloop::ElementA const*>(args.w),
        SparseConfig::fill_layoutA(cute::make_shape(m, n, k, 1)),
        static_cast<Element const*>(args.grad),
        stride_b,
        reinterpret_cast<typename Mainloop::ElementE const*>(w_meta),
        SparseConfig::fill_layoutE(cute::make_shape(int(w.m_meta), n, int(w.k_meta), 1))};
    arguments.mainloop.order = {args.tokens, args.interleaved ? args.quarter() : 1, args.interleaved ? 1 : 4};
    launch_gemm<Kernel>(arguments, stream, what);
  }
};

}  // namespace sparse24::cuda
