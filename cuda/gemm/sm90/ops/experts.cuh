// The products of experts for Hopper: the overlapped kernel (kernels/overlapped.cuh), whose scheduler finds the expert
// of a tile. Both operands are K-major, with the rows of w in the epilogue's order.
#pragma once

#include "gemm/experts_launchers.h"
#include "gemm/sm90/epilogues/compress.cuh"
#include "gemm/sm90/epilogues/experts.cuh"
#include "gemm/sm90/epilogues/relu2.cuh"
#include "gemm/sm90/mainloops/experts_mainloop.cuh"
#include "gemm/sm90/mainloops/sparse_mma.cuh"
#include "gemm/sm90/ops/dense.cuh"
#include "gemm/sm90/schedulers/expert_scheduler.cuh"

namespace sparse24::cuda {

// Tiles of kN columns. kSparse: A is 2:4.
template <DType kDType, bool kSparse, int kN, class Epilogue>
struct ExpertsSm90 {
  static constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  static constexpr int kTileK = int(meta_atom_k(kDType));
  using Element = typename GemmElement<kDType>::type;
  static constexpr int kAlignment = 16 / sizeof(Element);
  using TileShape = cute::Shape<cute::Int<kExpertRows>, cute::Int<kN>, cute::Int<kTileK>>;
  using ClusterShape = cute::Shape<cute::_2, cute::_1, cute::_1>;
  // Beside the table of the scheduler.
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(OperandStages<typename Epilogue::Operands>) + cute::round_up(sizeof(ExpertScheduler::Shared), 1024) +
      1024)>;
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90,
      std::conditional_t<kSparse, cutlass::arch::OpClassSparseTensorOp, cutlass::arch::OpClassTensorOp>, Element,
      cutlass::layout::RowMajor, kSparse ? 2 * kAlignment : kAlignment, Element, cutlass::layout::ColumnMajor,
      kAlignment, float, TileShape, ClusterShape, Stages, GemmSchedule<kFp8, /*kPingpong=*/false>>::CollectiveOp;
  using Permutation = typename Epilogue::Permutation;
  using Mainloop =
      std::conditional_t<kSparse, SparseExpertsMainloop<Base, Permutation>, DenseExpertsMainloop<Base, Permutation>>;
  template <bool, class = void>
  struct MmaOf {
    using type = DenseMma<Base, kN>;
  };
  template <class Unused>
  struct MmaOf<true, Unused> {
    using type = SparseMma<Base>;
  };
  using Kernel = OverlappedGemm<Mainloop, typename MmaOf<kSparse>::type, Epilogue, WholeTiles, ExpertScheduler>;

  static void launch(const Experts& experts, int64_t out, int64_t in, const typename Base::Arguments& operands,
                     const typename Epilogue::Params& epilogue, cudaStream_t stream, const char* what) {
    typename Kernel::Arguments arguments{
        {int(experts.rows), int(out), int(in), int(experts.count)}, operands, epilogue};
    arguments.offsets = experts.offsets;
    launch_gemm<Kernel>(arguments, stream, what);
  }

  // x [rows, in], w [experts, out, in]
  static typename Base::Arguments dense(const void* x, const void* w, int64_t in) {
    typename Base::StrideA stride_a{};
    typename Base::StrideB stride_b{};
    cute::get<0>(stride_a) = in;
    cute::get<0>(stride_b) = in;
    return {static_cast<Element const*>(x), stride_a, static_cast<Element const*>(w), stride_b};
  }
  // A of padded rows, w [experts, out, in]
  static typename Base::Arguments sparse(const void* values, const uint8_t* meta, const void* w, const Experts& experts,
                                         int64_t out, int64_t in) {
    using Config = typename Base::SparseConfig;
    const int m = int(experts.padded_rows()), n = int(out);
    typename Base::StrideB stride_b{};
    cute::get<0>(stride_b) = in;
    const Operand a = Operand::of(m, in, kDType, Dim::kFeatures);
    return {reinterpret_cast<typename Base::ElementA const*>(values),
            Config::fill_layoutA(cute::make_shape(m, n, int(a.k_values), 1)),
            reinterpret_cast<Element const*>(w),
            stride_b,
            reinterpret_cast<typename Base::ElementE const*>(meta),
            Config::fill_layoutE(cute::make_shape(int(a.m_meta), n, int(a.k_meta), 1))};
  }
};

// The columns of a tile of tiles.def, whose rows are kExpertRows.
template <GemmTile kTile>
inline constexpr int kExpertColumns = dense_tile(kTile).n;

template <DType kDType, DType kHidden, GemmTile kTile>
void launch_experts_linear_relu2_sm90(const ExpertsLinearRelu2Args& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Epilogue =
      ExpertsLinearEpilogue<Relu2Epilogue<typename CudaType<kHidden>::type, /*kFp8=*/false, kExpertRows, kN>,
                            /*kPadded=*/false>;
  using Gemm = ExpertsSm90<kDType, false, kN, Epilogue>;
  const LinearArgs& linear = args.of.linear;
  Gemm::launch(args.experts, linear.out, linear.in, Gemm::dense(linear.x, linear.w, linear.in),
               {LinearParams::of(linear), args.of.y}, stream, "sparse24.experts_linear_relu2: launch");
}

// Values are of kHidden; those of float8 operands are quantised afterwards.
template <DType kDType, DType kHidden, GemmTile kTile>
void launch_experts_linear_compress_sm90(const ExpertsLinearCompressArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Epilogue = ExpertsLinearEpilogue<CompressEpilogue<typename CudaType<kHidden>::type, /*kFp8Values=*/false,
                                                          /*kFp8Meta=*/kDType == DType::kFloat8E4M3, kExpertRows, kN>,
                                         /*kPadded=*/true>;
  using Gemm = ExpertsSm90<kDType, false, kN, Epilogue>;
  const LinearArgs& linear = args.of.linear;
  const Operand a = Operand::of(args.experts.padded_rows(), linear.out, kDType, Dim::kFeatures);
  Gemm::launch(args.experts, linear.out, linear.in, Gemm::dense(linear.x, linear.w, linear.in),
               {LinearParams::of(linear), a, args.of.values, args.of.meta}, stream,
               "sparse24.experts_linear_compress: launch");
}

inline ExpertsStoreParams store_params(const ExpertsProduct& of) {
  return {of.d,       of.d_dtype,   int(of.experts.rows), int(of.out),       of.scale_a,
          of.scale_w, of.row_scale, of.scale_a_per_row,   of.scale_w_per_row};
}

template <DType kDType, GemmTile kTile>
void launch_experts_linear_sm90(const ExpertsLinearArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Gemm = ExpertsSm90<kDType, false, kN, ExpertsStoreEpilogue<kExpertRows, kN, /*kPadded=*/false>>;
  const ExpertsProduct& of = args.of;
  Gemm::launch(of.experts, of.out, of.in, Gemm::dense(args.x, of.w, of.in), store_params(of), stream,
               "sparse24.experts_linear: launch");
}

template <DType kDType, GemmTile kTile>
void launch_experts_mm_sm90(const ExpertsMmArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Gemm = ExpertsSm90<kDType, true, kN, ExpertsStoreEpilogue<kExpertRows, kN, /*kPadded=*/true>>;
  const ExpertsProduct& of = args.of;
  Gemm::launch(of.experts, of.out, of.in, Gemm::sparse(args.values, args.meta, of.w, of.experts, of.out, of.in),
               store_params(of), stream, "sparse24.experts_mm: launch");
}

}  // namespace sparse24::cuda
