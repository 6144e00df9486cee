// The first GEMM with a 2:4 weight in tiles of one warpgroup: h.T [N, M] = w [N, K] @ x.T, in pingpong, so that neither
// a tile's beginning nor its end leaves the tensor cores idle.
#pragma once

#include "gemm/sm90/epilogues/compress_grouped.cuh"
#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/persistent.cuh"
#include "gemm/sm90/mainloops/grouped_sparse.cuh"
#include "gemm/sm90/ops/dense.cuh"
#include "gemm/sm90/schedulers/wave_scheduler.cuh"

namespace sparse24::cuda {

// T: what h is rounded to. Values are of kDType, as x and w are.
template <DType kDType, class T>
struct LinearGroupedSm90 {
  static constexpr TileSpec kSpec = dense_tile(GemmTile::k128x192);  // features, tokens
  static constexpr int kM = kSpec.m, kN = kSpec.n;
  static constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  using Element = typename GemmElement<kDType>::type;
  using Epilogue = OperandsAdapter<GroupedCompressEpilogue<T, kFp8, kM, kN>>;
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor,
      2 * 16 / sizeof(Element), Element, cutlass::layout::ColumnMajor, 16 / sizeof(Element), float,
      cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<int(meta_atom_k(kDType))>>,
      cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>, GemmStages<Epilogue>,
      GemmSchedule<kFp8, /*kPingpong=*/true>>::CollectiveOp;
  using Mainloop = GroupedSparseMainloop<Base, /*kGroupsTokens=*/false>;
  using Kernel = PersistentGemm<Mainloop, Epilogue, WaveScheduler<2, 1>>;
  using SparseConfig = typename Mainloop::SparseConfig;

  static void launch(const LinearCompressPackedArgs& args, const GemmConfig& config, cudaStream_t stream) {
    const LinearArgs& linear = args.compress.linear;
    const Operand w = Operand::of(linear.out, linear.in, kDType, Dim::kFeatures);
    const Operand a = Operand::of(linear.tokens, linear.out, kDType, Dim::kFeatures);
    // Tiles cover the metadata's padding, of tokens too.
    const int m = int(w.m), n = int(a.m_meta), k = int(w.k);
    typename Mainloop::StrideB stride_b{};
    cute::get<0>(stride_b) = linear.in;
    typename Kernel::Arguments arguments{
        {m, n, k, 1}, {}, {LinearParams::of(linear), a, args.compress.values, args.compress.meta}, config};
    static_cast<typename Base::Arguments&>(arguments.mainloop) = {
        static_cast<typename Mainloop::ElementA const*>(linear.w),
        SparseConfig::fill_layoutA(cute::make_shape(m, n, k, 1)),
        static_cast<Element const*>(linear.x),
        stride_b,
        reinterpret_cast<typename Mainloop::ElementE const*>(args.w_meta),
        SparseConfig::fill_layoutE(cute::make_shape(int(w.m_meta), n, int(w.k_meta), 1))};
    arguments.mainloop.order = {linear.tokens};
    launch_gemm<Kernel>(arguments, stream, "sparse24.linear_compress_packed: launch");
  }
};

}  // namespace sparse24::cuda
