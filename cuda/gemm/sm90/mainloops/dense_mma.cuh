// The mma of a dense tile, K tile by K tile, for the kernel of kernels/overlapped.cuh: that of one K tile is in flight
// while the next is issued. The kernel asks of it:
//
//     accumulators()             a fragment for a tile of kColumns columns
//     Registers                  what a thread keeps from one K tile to the next
//     operands(shared, thread)   the descriptors of the stages
//     k_tile<step>(..., before)  waits for a stage, issues its mma, finishes a step of the tile before, if it has that
//                                step, and gives a stage back
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "gemm/sm90/epilogues/steps.cuh"

namespace sparse24::cuda {

// Mainloop: a dense one of CUTLASS's for two warpgroups, of operands of either major. kColumns_: those of the tile, or
// of a part of it.
template <class Mainloop, int kColumns_>
struct DenseMma {
  static constexpr int kColumns = kColumns_;
  static constexpr int kTileM = cute::size<0>(typename Mainloop::TileShape{});
  static constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  using Element = typename Mainloop::TiledMma::ValTypeA;
  template <class Stride>
  static constexpr auto kMajor =
      cute::is_constant<1, decltype(cute::get<0>(Stride{}))>::value ? cute::GMMA::Major::MN : cute::GMMA::Major::K;
  using TiledMma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, typename Mainloop::TiledMma::ValTypeB, float,
                                 cute::Shape<cute::Int<kTileM>, cute::Int<kColumns>, cute::Int<kTileK>>,
                                 kMajor<typename Mainloop::StrideA>, kMajor<typename Mainloop::StrideB>>(),
      cute::Layout<cute::Shape<cute::_2, cute::_1, cute::_1>>{}));
  static constexpr uint32_t kBytes = (kTileM + kColumns) * kTileK * sizeof(Element);  // of a K tile
  struct Registers {};

  CUTLASS_DEVICE static auto accumulators() {
    return cute::partition_fragment_C(TiledMma{}, cute::Shape<cute::Int<kTileM>, cute::Int<kColumns>>{});
  }

  CUTLASS_DEVICE static auto operands(typename Mainloop::TensorStorage& shared, int thread) {
    using namespace cute;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Mainloop::SmemLayoutA{});
    const Tensor b = make_tensor(make_smem_ptr(shared.smem_B.data()), typename Mainloop::SmemLayoutB{});
    // The first rows of B's stages hold a part.
    const Tensor part = local_tile(b, Shape<Int<kColumns>, Int<kTileK>>{}, make_coord(_0{}, _0{}));
    // Descriptors are a warpgroup's: the same for all of its threads.
    const auto slice = TiledMma{}.get_slice(__shfl_sync(0xffffffffu, thread / 128, 0) * 128);
    return cute::make_tuple(slice.make_fragment_A(slice.partition_A(a)),      // (MMA, M, K, stage)
                            slice.make_fragment_B(slice.partition_B(part)));  // (MMA, N, K, stage)
  }

  // kStep: the step; of K tiles behind the last step an even and an odd number, by turns.
  template <int kStep, class Operands, class Pipeline, class State, class Accumulators, class Before>
  CUTLASS_DEVICE static void k_tile(Operands const& operands, Pipeline& pipeline, State& read, State& done, Registers&,
                                    Accumulators& accumulators, Before& before) {
    using namespace cute;
    auto const& [a, b] = operands;
    TiledMma mma;
    mma.accumulate_ = kStep == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(a); ++k) {
      cute::gemm(mma, a(_, _, k, read.index()), b(_, _, k, read.index()), accumulators);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++read;
    if constexpr (kStep < Before::kSteps) visit_step<kStep>(before);
    if constexpr (kStep > 0) {
      warpgroup_wait<1>();
      warpgroup_fence_operand(accumulators);
      pipeline.consumer_release(done);
      ++done;
    }
  }
};

}  // namespace sparse24::cuda
