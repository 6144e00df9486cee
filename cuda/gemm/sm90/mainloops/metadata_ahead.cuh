// The mainloop of grouped_sparse.cuh with metadata that is there when its mma can be issued.
#pragma once

#include "gemm/sm90/mainloops/grouped_sparse.cuh"

namespace sparse24::cuda {

// One warpgroup has but half a K tile in flight, which is over before a load from shared memory and a barrier are. So
// the metadata of the next mma is loaded before the last ones are waited for. Not in linear_gradient, whose epilogue
// leaves no registers.
template <class Base_>
struct MetadataAhead : GroupedSparseMainloop<Base_, /*kGroupsTokens=*/false> {
  using Base = GroupedSparseMainloop<Base_, false>;
  using Base::first_byte, Base::kBytesE, Base::kMmas, Base::metadata_word;
  using typename Base::MainloopPipeline;
  using typename Base::Metadata;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TiledMma;

  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& accumulators, int k_tiles,
                          int thread, TensorStorage& shared, typename Base::Params const&) {
    using namespace cute;
    const Tensor stages_a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const Tensor stages_b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Base::SmemLayoutB{});
    const auto slice = TiledMma{}.get_slice(0);
    const auto a = slice.make_fragment_A(slice.partition_A(stages_a));  // (MMA, M, K, stage)
    const auto b = slice.make_fragment_B(slice.partition_B(stages_b));  // (MMA, N, K, stage)
    const auto* e = reinterpret_cast<const uint8_t*>(&shared.smem_E) + first_byte(thread);
    // All bytes in their order; no constant, or the compiler would load to the registers that wgmma reads, and those
    // must not be written while mma before it are in flight.
    const uint32_t in_order = 0x3210 + (k_tiles >> 30);
    PipelineState done = read;
    Metadata metadata;
    Tensor words = recast<uint32_t>(metadata);
    uint32_t next[2];
    const auto load = [&](int k) {
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) next[h] = metadata_word(e + read.index() * kBytesE, h, k, thread);
    };
    TiledMma mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    load(0);
    warpgroup_fence_operand(accumulators);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 0; tile < k_tiles; ++tile) {
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kMmas; ++k) {
        CUTLASS_PRAGMA_UNROLL
        for (int h = 0; h < 2; ++h) words(0, h, k) = permute_bytes(next[h], next[h], in_order);
        warpgroup_fence_operand(accumulators);
        warpgroup_arrive();
        cute::gemm(mma, make_zip_tensor(a(_, _, k, read.index()), metadata(_, _, k)), b(_, _, k, read.index()),
                   accumulators);
        mma.accumulate_ = GMMA::ScaleOut::One;
        warpgroup_commit_batch();
        if (k + 1 < kMmas) {
          load(k + 1);
        } else {
          ++read;
          if (tile + 1 < k_tiles) {
            pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
            load(0);
          }
        }
        warpgroup_wait<1>();
        warpgroup_fence_operand(accumulators);
        if (k == 0 && tile > 0) {
          pipeline.consumer_release(done);
          ++done;
        }
      }
    }
  }
};

}  // namespace sparse24::cuda
