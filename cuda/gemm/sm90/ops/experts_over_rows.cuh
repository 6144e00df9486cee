// The products over the rows of each expert for Hopper: both operands are MN-major, and tiles have as many K tiles as
// their expert has rows for.
#pragma once

#include "gemm/sm90/mainloops/over_rows.cuh"
#include "gemm/sm90/ops/experts.cuh"
#include "gemm/sm90/schedulers/over_rows_scheduler.cuh"

namespace sparse24::cuda {

// An epilogue in fewer steps, for tiles of few K tiles.
template <class Epilogue, int kTogether>
struct StepsTogether : Epilogue {
  using Epilogue::Epilogue;
  static constexpr int kSteps = Epilogue::kSteps / kTogether;
  static_assert(Epilogue::kSteps % kTogether == 0, "whole steps");

  template <int kStep, bool kGeneral, int kPart = 0>
  CUTLASS_DEVICE void visit() {
    if constexpr (kPart < kTogether) {
      Epilogue::template visit<kTogether * kStep + kPart, kGeneral>();
      visit<kStep, kGeneral, kPart + 1>();
    }
  }
};

template <DType kDType, GemmTile kTile>
void launch_experts_weight_gradient_sm90(const ExpertsWeightGradientArgs& args, cudaStream_t stream) {
  constexpr int kN = kExpertColumns<kTile>;
  using Element = typename GemmElement<kDType>::type;
  using Epilogue = StepsTogether<ExpertsStoreEpilogue<kExpertRows, kN, /*kPadded=*/false, /*kPermutedN=*/false>, 2>;
  using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
      sizeof(OperandStages<typename Epilogue::Operands>) + cute::round_up(sizeof(ExpertScheduler::Shared), 1024) +
      1024)>;
  using Base = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::ColumnMajor, 8, Element,
      cutlass::layout::RowMajor, 8, float, cute::Shape<cute::Int<kExpertRows>, cute::Int<kN>, cute::_64>,
      cute::Shape<cute::_2, cute::_1, cute::_1>, Stages, GemmSchedule<false, /*kPingpong=*/false>>::CollectiveOp;
  using Mainloop = OverRowsMainloop<Base>;
  using Kernel = OverlappedGemm<Mainloop, OverRowsMma<Mainloop, kN>, Epilogue, WholeTiles, OverRowsScheduler>;

  const Experts& experts = args.experts;
  typename Base::StrideA stride_a{};
  typename Base::StrideB stride_b{};
  cute::get<1>(stride_a) = args.m;
  cute::get<1>(stride_b) = args.n;
  const int rows_of_d = int(experts.count * args.m);
  typename Kernel::Arguments arguments{
      {int(args.m), int(args.n), int(experts.rows), int(experts.count)},
      {static_cast<Element const*>(args.a), stride_a, static_cast<Element const*>(args.b), stride_b},
      ExpertsStoreParams{args.d, kDType, rows_of_d, int(args.n), nullptr, nullptr, nullptr, 0, 0}};
  arguments.offsets = experts.offsets;
  launch_gemm<Kernel>(arguments, stream, "sparse24.experts_weight_gradient: launch");
}

}  // namespace sparse24::cuda
