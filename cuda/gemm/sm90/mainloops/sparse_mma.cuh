// The mma of a 2:4 tile, K tile by K tile, for the kernel of kernels/overlapped.cuh (mainloops/dense_mma.cuh says what
// that asks): the mma of one K tile is in flight while that of the next is issued.
//
// Metadata has two sets of registers for that. A stage is given back a K tile later than it could be, which costs more
// than it gains where copies are late already: so a stage whose successor has not arrived is given back at once.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "gemm/sm90/epilogues/steps.cuh"

namespace sparse24::cuda {

// Mainloop: CUTLASS's sparse one for two warpgroups, each of which has 64 rows of the tile.
template <class Mainloop>
struct SparseMma {
  using TiledMma = typename Mainloop::TiledMma;
  using TileShape = typename Mainloop::TileShape;
  static constexpr int kMmas = 2;  // in a K tile
  using Metadata = decltype(cute::make_tensor<typename Mainloop::ElementEMma>(
      cute::make_shape(cute::_32{}, cute::_1{}, cute::Int<kMmas>{})));
  struct Registers {
    Metadata metadata[2];
  };

  CUTLASS_DEVICE static auto accumulators() {
    return cute::partition_fragment_C(TiledMma{}, cute::take<0, 2>(TileShape{}));
  }

  CUTLASS_DEVICE static auto operands(typename Mainloop::TensorStorage& shared, int thread) {
    using namespace cute;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Mainloop::SmemLayoutA{});
    const Tensor b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Mainloop::SmemLayoutB{});
    const auto* e = reinterpret_cast<const uint8_t*>(raw_pointer_cast(shared.smem_E.begin())) + first_byte(thread);
    // Descriptors are a warpgroup's: the same for all of its threads.
    const auto slice = TiledMma{}.get_slice(__shfl_sync(0xffffffffu, thread / 128, 0) * 128);
    return cute::make_tuple(slice.make_fragment_A(slice.partition_A(a)),  // (MMA, M, K, stage)
                            slice.make_fragment_B(slice.partition_B(b)),  // (MMA, N, K, stage)
                            e);
  }

  // kStep: the step; of K tiles behind the last step an even and an odd number, by turns.
  template <int kStep, class Operands, class Pipeline, class State, class Accumulators, class Before>
  CUTLASS_DEVICE static void k_tile(Operands const& operands, Pipeline& pipeline, State& read, State& done,
                                    Registers& registers, Accumulators& accumulators, Before& before) {
    using namespace cute;
    auto const& [a, b, e] = operands;
    static_assert(decltype(size<1>(a))::value == 1 && decltype(size<2>(a))::value == kMmas, "64 rows, two mma");
    bool arrived = true;
    if constexpr (kStep > 0) {
      arrived = __all_sync(0xffffffffu, pipeline.consumer_test_wait(read).get() == cutlass::BarrierStatus::WaitDone);
      if (!arrived) {
        warpgroup_wait<0>();
        pipeline.consumer_release(done);
      }
    }
    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    Metadata& metadata = registers.metadata[kStep % 2];
    Tensor words = recast<uint32_t>(metadata);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kMmas; ++k)
      words(0, 0, k) = *reinterpret_cast<const uint32_t*>(e + read.index() * kStageBytes + k * kMmaBytes);
    TiledMma mma;
    mma.accumulate_ = kStep == 0 ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kMmas; ++k) {
      cute::gemm(mma, make_zip_tensor(a(_, _, k, read.index()), metadata(_, _, k)), b(_, _, k, read.index()),
                 accumulators);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++read;
    if constexpr (kStep < Before::kSteps) visit_step<kStep>(before);
    if constexpr (kStep > 0) {
      if (arrived) {
        warpgroup_wait<1>();
        pipeline.consumer_release(done);
      }
      warpgroup_fence_operand(accumulators);
      ++done;
    }
  }

 private:
  // How many bytes of metadata a stage has, and how far those of one mma lie from those of the next: format.h draws it.
  static constexpr bool kFp8 = sizeof(typename Mainloop::ElementB) == 1;
  static constexpr int kStageBytes = cute::size<0>(TileShape{}) * cute::size<2>(TileShape{}) / 8;
  static constexpr int kMmaBytes = kFp8 ? 8 : 4;

  // Where a thread's metadata of the first mma lies in a stage, as wgmma.sp reads it. In fp8 lane q of a quad has 32
  // columns of row r + 8 (q & 1); in 16 bits it has 16 columns of both rows, and lanes 2 and 3 are not asked.
  CUTLASS_DEVICE static int first_byte(int thread) {
    const int r = thread % 32 / 4, q = thread % 4;
    if constexpr (kFp8) return (thread / 32 * 16 + r + 8 * (q & 1)) * 16 + 4 * (q >> 1);
    return thread / 32 * 128 + (q & 1) * 64 + r * 8;
  }
};

}  // namespace sparse24::cuda
