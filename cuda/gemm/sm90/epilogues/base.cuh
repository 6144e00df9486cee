// What CUTLASS's kernel layer asks of an epilogue that takes raw accumulators and does its own stores.
//
// All epilogues here start from the same fragment (PTX ISA, wgmma D fragments). Of each block b of 8 columns, lane
// 4 r + q of a warp holds four accumulators, two neighbours in each of two rows:
//
//     4b, 4b + 1        row r        columns 2q, 2q + 1     (half 0)
//     4b + 2, 4b + 3    row r + 8    columns 2q, 2q + 1     (half 1)
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>

namespace sparse24::cuda {

// The shared memory of an epilogue that needs none.
struct NoStorage {};

// The types and empty hooks of an epilogue, which derives from this and adds operator(). `Params_` travels to the
// kernel as it is. CUTLASS's kernels take such an epilogue inside of a cutlass::epilogue::collective::detail::
// Sm90TmaWarpSpecializedAdapter, or of an OperandsAdapter, if it has operands.
template <class Params_, class Shared>
class EpilogueBase {
 public:
  using EpilogueSchedule = cutlass::gemm::EpilogueDefault;
  using DispatchPolicy = EpilogueSchedule;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using ElementScalar = float;
  using ElementC = void;
  using ElementD = float;
  using ElementOutput = float;
  using StrideC = cute::Stride<int64_t, cute::_1, int64_t>;
  using StrideD = StrideC;
  struct ThreadEpilogueOp {
    using ElementOutput = float;
    using ElementAccumulator = float;
    using ElementCompute = float;
    using ElementScalar = float;
    using ElementC = float;
    using ElementD = float;
    static constexpr int kCount = 1;
    struct Params {};
  };
  using SharedStorage = Shared;
  using TensorStorage = Shared;
  using Arguments = Params_;
  using Params = Params_;

  template <class Shape>
  static constexpr Params to_underlying_arguments(Shape const&, Arguments const& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(Shape const&, Arguments const&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(Shape const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Shape>
  static bool can_implement(Shape const&, Arguments const&) {
    return true;
  }

  CUTLASS_HOST_DEVICE explicit EpilogueBase(Params const& params) : p_(params) {}
  CUTLASS_DEVICE bool is_source_needed() { return false; }

 protected:
  Params p_;
};

}  // namespace sparse24::cuda
