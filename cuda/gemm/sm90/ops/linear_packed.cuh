// The first GEMM with a 2:4 weight for Hopper. wgmma's sparse operand is A, so that the product is h.T [N, M] =
// w [N, K] @ x.T, with an epilogue whose rows are features: in tiles of one warpgroup (ops/linear_grouped.cuh), or,
// where these are not compiled, in the overlapped kernel of mm.
#pragma once

#include "gemm/linear_packed_launchers.h"
#include "gemm/sm90/epilogues/compress_transposed.cuh"
#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/overlapped.cuh"
#include "gemm/sm90/mainloops/permuted_n_mainloop.cuh"
#include "gemm/sm90/mainloops/sparse_mma.cuh"
#include "gemm/sm90/mainloops/sparse_rows_mainloop.cuh"
#include "gemm/sm90/ops/dense.cuh"
#include "gemm/sm90/ops/linear_grouped.cuh"
#include "gemm/sm90/schedulers/scheduler_of.cuh"

namespace sparse24::cuda {

// Epilogue: in steps.
template <DType kDType, class Epilogue>
struct PackedSm90 {
  static constexpr TileSpec kSpec = sparse_tile(GemmTile::k128x256);
  using Element = typename GemmElement<kDType>::type;
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * 16 / sizeof(Element), Element, cutlass::layout::ColumnMajor, 16 / sizeof(Element), float,
      cute::Shape<cute::Int<kSpec.m>, cute::Int<kSpec.n>, cute::Int<int(meta_atom_k(kDType))>>,
      cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>, OverlappedStages<Epilogue>,
      GemmSchedule<kDType == DType::kFloat8E4M3, /*kPingpong=*/false>>::CollectiveOp;
  using Mainloop = SparseRowsMainloop<Base, PermutedNRows<Base, PermutedN<8>>>;  // of which it takes x's own order
  using Kernel = OverlappedGemm<Mainloop, SparseMma<Mainloop>, Epilogue, WholeTiles,
                                SchedulerOf<kSpec.scheduler(), kSpec.cluster_m, kSpec.cluster_n>>;
  using SparseConfig = typename Mainloop::SparseConfig;

  // h.T of x and of w, whose metadata is w_meta.
  static void launch(const LinearArgs& args, const uint8_t* w_meta, const GemmConfig& config,
                     const typename Epilogue::Params& epilogue, cudaStream_t stream, const char* what) {
    const Operand w = Operand::of(args.out, args.in, kDType, Dim::kFeatures);
    const int m = int(w.m), n = int(args.tokens), k = int(w.k);
    typename Mainloop::StrideB stride_b{};
    cute::get<0>(stride_b) = args.in;
    typename Kernel::Arguments arguments{{m, n, k, 1}, {}, epilogue, config};
    // The metadata is described by its padded sizes.
    static_cast<typename Base::Arguments&>(arguments.mainloop) = {
        static_cast<typename Mainloop::ElementA const*>(args.w),
        SparseConfig::fill_layoutA(cute::make_shape(m, n, k, 1)),
        static_cast<Element const*>(args.x),
        stride_b,
        reinterpret_cast<typename Mainloop::ElementE const*>(w_meta),
        SparseConfig::fill_layoutE(cute::make_shape(int(w.m_meta), n, int(w.k_meta), 1))};
    launch_gemm<Kernel>(arguments, stream, what);
  }
};

template <DType kDType, DType kPreActivation, DType kY, DType kMeta>
void launch_linear_compress_packed_sm90(const LinearCompressPackedArgs& args, const GemmConfig& config,
                                        cudaStream_t stream) {
  using T = typename CudaType<kPreActivation>::type;
  if constexpr (kY == kDType && kMeta == kDType) {
    if (config.tile == GemmTile::k128x192) return LinearGroupedSm90<kDType, T>::launch(args, config, stream);
  }
  if constexpr (kY != DType::kFloat8E4M3) {
    constexpr TileSpec kTile = sparse_tile(GemmTile::k128x256);
    using Epilogue = TransposedCompressEpilogue<T, kMeta == DType::kFloat8E4M3, kTile.m, kTile.n>;
    const LinearArgs& linear = args.compress.linear;
    const Operand a = Operand::of(linear.tokens, linear.out, kMeta, Dim::kFeatures);
    PackedSm90<kDType, Epilogue>::launch(linear, args.w_meta, config,
                                         {LinearParams::of(linear), a, args.compress.values, args.compress.meta},
                                         stream, "sparse24.linear_compress_packed: launch");
  }
}

}  // namespace sparse24::cuda
