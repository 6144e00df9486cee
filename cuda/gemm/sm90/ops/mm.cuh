// The sparse GEMM for Hopper: CUTLASS's warp-specialised wgmma.sp mainloop with the epilogue of epilogues/store.cuh, or
// the kernel of kernels/overlapped.cuh with that of epilogues/store_steps.cuh.
//
// A [M, K] is 2:4 and comes compressed with its metadata E, B [K, N] is dense; fp8 accumulates fast (no promotion).
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include "gemm/mm_launchers.h"
#include "gemm/mm_splits.h"
#include "gemm/sm90/epilogues/store_steps.cuh"
#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/overlapped.cuh"
#include "gemm/sm90/kernels/persistent.cuh"
#include "gemm/sm90/mainloops/interleaved_rows.cuh"
#include "gemm/sm90/mainloops/permuted_n_mainloop.cuh"
#include "gemm/sm90/mainloops/sparse_mma.cuh"
#include "gemm/sm90/mainloops/sparse_rows_mainloop.cuh"
#include "gemm/sm90/schedulers/scheduler_of.cuh"

namespace sparse24::cuda {

// CUTLASS's mainloop, or that with loads of ours.
template <class Base, bool kMayInterleave, bool kPermutedN>
struct MmMainloop {
  using type = Base;
};
template <class Base>
struct MmMainloop<Base, true, false> {
  using type = SparseRowsMainloop<Base, InterleavedRows<Base>>;
};
template <class Base>
struct MmMainloop<Base, false, true> {
  using type = SparseRowsMainloop<Base, PermutedNRows<Base, PermutedN<8>>>;
};

template <DType kDType, Dim kADim, Major kBMajor, GemmTile kTile>
struct MmSm90 {
  static constexpr TileSpec kSpec = sparse_tile(kTile);
  static constexpr int kM = kSpec.m, kN = kSpec.n;
  using Element = typename GemmElement<kDType>::type;
  using TileShape = cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<int(meta_atom_k(kDType))>>;
  using ClusterShape = cute::Shape<cute::Int<kSpec.cluster_m>, cute::Int<kSpec.cluster_n>, cute::_1>;

  using LayoutA = std::conditional_t<kADim == Dim::kFeatures, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using LayoutB =
      std::conditional_t<kBMajor == Major::kColumn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignmentA = 2 * 16 / sizeof(Element);  // logical: 16 bytes of compressed values
  static constexpr int kAlignmentB = 16 / sizeof(Element);

  static constexpr bool kPermutedN = kBMajor == Major::kColumn;
  using Epilogue = OperandsAdapter<StoreEpilogue<kM, kN, kPermutedN>>;
  template <class Stages>
  using BaseOf = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, LayoutA, kAlignmentA, Element, LayoutB,
      kAlignmentB, float, TileShape, ClusterShape, Stages,
      GemmSchedule<kDType == DType::kFloat8E4M3, /*kPingpong=*/(kSpec.schedule == Schedule::kPingpong)>>::CollectiveOp;
  using Base = BaseOf<GemmStages<Epilogue>>;
  static constexpr bool kMayInterleave = kADim == Dim::kTokens;
  using Mainloop = typename MmMainloop<Base, kMayInterleave, kPermutedN>::type;
  // Batches, the parts of a split K, are CUTLASS's scheduler's.
  using Kernel = PersistentGemm<Mainloop, Epilogue, CutlassScheduler<kSpec.cluster_m, kSpec.cluster_n>>;
  using SparseConfig = typename Mainloop::SparseConfig;

  using LayoutOfA = decltype(SparseConfig::fill_layoutA(cute::Shape<int, int, int, int>{}));

  // Lays out the values of `splits` parts of K, which are its batches: k columns each, side by side in rows of
  // k_values.
  static LayoutOfA layout_a(const MmArgs& args, int k, int splits) {
    using cute::_1, cute::_2, cute::get;
    if constexpr (kADim == Dim::kFeatures) {
      if (splits > 1) {
        return cute::make_layout(
            cute::make_shape(int(args.a.m), cute::make_shape(_2{}, k / 2), splits),
            cute::make_stride(int64_t{args.a.k_values}, cute::make_stride(_1{}, _2{}), int64_t{k}));
      }
    }
    const auto padded =
        SparseConfig::fill_layoutA(cute::make_shape(int(args.a.m), int(args.n), int(args.a.k_values), 1));
    // Tokens of the padding read as zeros, whatever is stored for them: the zeros that they multiply would make NaN of
    // an infinity.
    const auto shape = cute::make_shape(get<0>(padded.shape()), cute::make_shape(_2{}, int(args.a.kept())), 1);
    return cute::make_layout(shape, padded.stride());
  }

  static typename Kernel::Arguments arguments(const MmArgs& args, const GemmConfig& config) {
    const int splits = config.splits;
    const int m = int(args.a.m), n = int(args.n), k = int(args.a.k) / splits;
    // E is described by its padded sizes, A and B by their own: no load leaves a buffer. Parts need no padding.
    const int k_meta = splits == 1 ? int(args.a.k_meta) : k;
    const auto layout_e = SparseConfig::fill_layoutE(cute::make_shape(int(args.a.m_meta), n, k_meta, splits));

    typename Mainloop::StrideB stride_b{};
    cute::get<kBMajor == Major::kColumn ? 0 : 1>(stride_b) = args.ldb;
    cute::get<2>(stride_b) = splits == 1 ? 0 : kBMajor == Major::kColumn ? k : k * args.ldb;

    StoreParams store{};
    store.d = args.d;
    store.d_dtype = args.d_dtype;
    store.transposed = args.d_major == Major::kColumn;
    store.ldd = splits > 1 ? partial_sums_ld(args) : store.transposed ? args.a.m : args.n;
    const bool pairs = args.d_dtype == DType::kFloat32 && !store.transposed;
    store.vectorised = store.ldd % (pairs ? 2 : 8) == 0 &&
                       reinterpret_cast<uintptr_t>(args.d) % (pairs ? 8 : 16) == 0 &&
                       (pairs || args.d_dtype != DType::kFloat32);
    store.scale_a = args.scale_a;
    store.scale_b = args.scale_b;
    store.scale_a_stride = args.scale_a_per_row;
    store.scale_b_stride = args.scale_b_per_column;
    store.bias = args.bias;
    store.bias_dtype = args.bias_dtype;

    typename Kernel::Arguments out{{m, n, k, splits}, {}, store, config};
    static_cast<typename Base::Arguments&>(out.mainloop) = {
        reinterpret_cast<typename Mainloop::ElementA const*>(args.values),
        layout_a(args, k, splits),
        reinterpret_cast<Element const*>(args.b),
        stride_b,
        reinterpret_cast<typename Mainloop::ElementE const*>(args.meta),
        layout_e};
    if constexpr (kMayInterleave) out.mainloop.rows = {args.b_interleaved, args.b_tail, args.ldb_tail};
    if constexpr (kPermutedN) out.mainloop.rows = {store.permutes_n()};
    return out;
  }

  static void launch(const MmArgs& args, const GemmConfig& config, cudaStream_t stream) {
    const auto of = arguments(args, config);
    if constexpr (kSpec.schedule == Schedule::kOverlapped) {
      if (launch_overlapped(of, stream)) return;
    }
    launch_gemm<Kernel>(of, stream, "sparse24.mm: launch");
  }

 private:
  // Runs the epilogue under the next tile's mma, where it stores vectors of 16 bits and K has a tile for each of
  // its steps; false elsewhere. Rows of D.T do not want a K-major B in the permuted order.
  static bool launch_overlapped(const typename Kernel::Arguments& of, cudaStream_t stream) {
    if constexpr (kPermutedN) {
      if (of.epilogue.transposed) return launch_steps<false>(of, stream);
    }
    return launch_steps<kPermutedN>(of, stream);
  }

  template <bool kPermuted>
  static bool launch_steps(const typename Kernel::Arguments& of, cudaStream_t stream) {
    using Steps = StoreSteps<kM, kN, kPermuted>;
    static_assert(Steps::kSteps == kSpec.min_k_tiles());
    using OverlappedBase = BaseOf<OverlappedStages<Steps>>;
    using Loads = typename MmMainloop<OverlappedBase, kMayInterleave, kPermuted>::type;
    using Overlapped = OverlappedGemm<Loads, SparseMma<Loads>, Steps, WholeTiles,
                                      SchedulerOf<kSpec.scheduler(), kSpec.cluster_m, kSpec.cluster_n>>;
    const auto [rows, cols, k, parts] = of.problem;
    const bool stores = kPermuted ? of.epilogue.permutes_n() : of.epilogue.in_steps();
    if (parts > 1 || !stores || k < kSpec.min_k_tiles() * of.config.tile_k) return false;
    const auto& m = of.mainloop;
    typename Overlapped::Arguments overlapped{of.problem, {}, {of.epilogue, rows, cols}, of.config};
    static_cast<typename OverlappedBase::Arguments&>(overlapped.mainloop) = {m.ptr_A, m.layout_a, m.ptr_B,
                                                                             m.dB,    m.ptr_E,    m.layout_e};
    if constexpr (kPermuted || kMayInterleave) overlapped.mainloop.rows = m.rows;
    launch_gemm<Overlapped>(overlapped, stream, "sparse24.mm: launch");
    return true;
  }
};

template <DType kDType, Dim kADim, Major kBMajor, GemmTile kTile>
void launch_mm_sm90(const MmArgs& args, const GemmConfig& config, cudaStream_t stream) {
  MmSm90<kDType, kADim, kBMajor, kTile>::launch(args, config, stream);
}

}  // namespace sparse24::cuda
