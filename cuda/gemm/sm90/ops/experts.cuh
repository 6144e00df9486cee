// The products of experts for Hopper: the overlapped kernel (kernels/overlapped.cuh), whose scheduler finds the expert
// of a tile. A is K-major. So is w of forward passes and of float8, with its rows in the epilogue's order; that of
// backward passes in 16 bits is MN-major.
#pragma once

#include "gemm/experts_launchers.h"
#include "gemm/sm90/epilogues/compress.cuh"
#include "gemm/sm90/epilogues/experts.cuh"
#include "gemm/sm90/epilogues/experts_gradient.cuh"
#include "gemm/sm90/epilogues/relu2.cuh"
#include "gemm/sm90/mainloops/expert_columns.cuh"
#include "gemm/sm90/mainloops/expert_rows.cuh"
#include "gemm/sm90/mainloops/experts_mainloop.cuh"
#include "gemm/sm90/mainloops/sparse_mma.cuh"
#include "gemm/sm90/ops/dense.cuh"
#include "gemm/sm90/schedulers/expert_scheduler.cuh"

namespace sparse24::cuda {

// What copies w: ExpertRows in the order of an epilogue, or ExpertColumns.
template <class Epilogue, Major>
struct ExpertLoads {
  template <class Base>
  using Rows = ExpertRows<Base, typename Epilogue::Permutation>;
};
template <class Epilogue>
struct ExpertLoads<Epilogue, Major::kRow> {
  template <class Base>
  using Rows = ExpertColumns<Base>;
};

// Tiles of kN columns. kSparse: A is 2:4.
template <DType kDType, bool kSparse, int kN, class Epilogue, Major kMajor = Major::kColumn>
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
      cutlass::layout::RowMajor, kSparse ? 2 * kAlignment : kAlignment, Element,
      std::conditional_t<kMajor == Major::kColumn, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>, kAlignment,
      float, TileShape, ClusterShape, Stages, GemmSchedule<kFp8, /*kPingpong=*/false>>::CollectiveOp;
  using Rows = typename ExpertLoads<Epilogue, kMajor>::template Rows<Base>;
  using Mainloop = std::conditional_t<kSparse, SparseExpertsMainloop<Base, Rows>, DenseExpertsMainloop<Base, Rows>>;
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

  static typename Base::StrideB stride_of_w(int64_t out, int64_t in) {
    typename Base::StrideB stride{};
    if constexpr (kMajor == Major::kColumn) {
      cute::get<0>(stride) = in;
    } else {
      cute::get<1>(stride) = out;
    }
    return stride;
  }
  // x [rows, in], w [experts, out, in], or [experts, in, out]
  static typename Base::Arguments dense(const void* x, const void* w, int64_t out, int64_t in) {
    typename Base::StrideA stride_a{};
    cute::get<0>(stride_a) = in;
    const auto stride_b = stride_of_w(out, in);
    return {static_cast<Element const*>(x), stride_a, static_cast<Element const*>(w), stride_b};
  }
  // A of padded rows, w likewise
  static typename Base::Arguments sparse(const void* values, const uint8_t* meta, const void* w, const Experts& experts,
                                         int64_t out, int64_t in) {
    using Config = typename Base::SparseConfig;
    const int m = int(experts.padded_rows()), n = int(out);
    const auto stride_b = stride_of_w(out, in);
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
  Gemm::launch(args.experts, linear.out, linear.in, Gemm::dense(linear.x, linear.w, linear.out, linear.in),
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
  Gemm::launch(args.experts, linear.out, linear.in, Gemm::dense(linear.x, linear.w, linear.out, linear.in),
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
  Gemm::launch(of.experts, of.out, of.in, Gemm::dense(args.x, of.w, of.out, of.in), store_params(of), stream,
               "sparse24.experts_linear: launch");
}

template <DType kDType, Major kMajor, GemmTile kTile>
void launch_experts_mm_sm90(const ExpertsMmArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Epilogue = ExpertsStoreEpilogue<kExpertRows, kN, /*kPadded=*/true, /*kPermutedN=*/kMajor == Major::kColumn>;
  using Gemm = ExpertsSm90<kDType, true, kN, Epilogue, kMajor>;
  const ExpertsProduct& of = args.of;
  Gemm::launch(of.experts, of.out, of.in, Gemm::sparse(args.values, args.meta, of.w, of.experts, of.out, of.in),
               store_params(of), stream, "sparse24.experts_mm: launch");
}

template <DType kDType, GemmTile kTile>
void launch_experts_linear_gradient_sm90(const ExpertsLinearGradientArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  static_assert(kN == ExpertsLinearGradientArgs::kTileColumns, "a sum for each tile");
  constexpr bool kFp8 = kDType == DType::kFloat8E4M3;
  using Result = typename CudaType<kFp8 ? DType::kBFloat16 : kDType>::type;
  using Epilogue = ExpertsGradientEpilogue<Result, kFp8, kExpertRows, kN>;
  using Gemm = ExpertsSm90<kDType, false, kN, Epilogue, kFp8 ? Major::kColumn : Major::kRow>;
  const Experts& experts = args.experts;
  const ExpertsGradientParams epilogue{int(experts.rows),
                                       int(args.features),
                                       int(experts.padded_rows()),
                                       args.values,
                                       args.meta,
                                       args.row_scale,
                                       args.dh,
                                       args.dh_dense,
                                       args.y_dense,
                                       args.products,
                                       args.scale_grad,
                                       args.scale_w,
                                       args.scale_y,
                                       args.scale_grad_per_row,
                                       args.scale_w_per_row};
  Gemm::launch(experts, args.features, args.in, Gemm::dense(args.grad, args.w, args.features, args.in), epilogue,
               stream, "sparse24.experts_linear_gradient: launch");
}

}  // namespace sparse24::cuda
