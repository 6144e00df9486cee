// The consumer's half of CUTLASS's sparse mainloop for fp8, with the products of a K tile in flight while those of the
// next are issued.
//
// CUTLASS waits for all products of a K tile before it loads the metadata of the next into the same registers, so the
// tensor cores wait wherever the two warpgroups do not take turns exactly. Here metadata has two sets of registers. A
// stage is then given back a K tile later, which costs more than it gains where copies are late already: so a stage
// whose successor has not arrived is given back at once (bench/NOTES.md has the measurements, and those of 16 bits).
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace sparse24::cuda {

// Stock: the collective that CUTLASS builds, whose loads, buffers and barriers stay as they are. A warpgroup has 64
// rows of the tile, and a K tile two products.
template <class Stock>
struct SparseMainloopFp8 : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TiledMma;

  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& accumulators, int k_tiles,
                          int thread, TensorStorage& shared, typename Stock::Params const&) {
    using namespace cute;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Stock::SmemLayoutA{});
    const Tensor b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Stock::SmemLayoutB{});
    TiledMma mma;
    // Descriptors are a warpgroup's: the same for all of its threads.
    const auto slice = mma.get_slice(__shfl_sync(0xffffffffu, thread / 128, 0) * 128);
    const Tensor of_a = slice.make_fragment_A(slice.partition_A(a));  // (MMA, M, K, stage)
    const Tensor of_b = slice.make_fragment_B(slice.partition_B(b));  // (MMA, N, K, stage)
    static_assert(size<1>(of_a) == 1 && size<2>(of_a) == 2, "64 rows, two products");
    using Metadata = decltype(make_tensor<typename Stock::ElementEMma>(make_shape(_32{}, _1{}, _2{})));
    Metadata meta[2];
    const auto* bytes = reinterpret_cast<const uint8_t*>(raw_pointer_cast(shared.smem_E.begin())) + first_byte(thread);

    PipelineState done = read;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(accumulators);
    multiply(pipeline, read, mma, of_a, of_b, bytes, meta[0], accumulators);
    --k_tiles;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 1; k_tiles -= 2) {
      multiply_next(pipeline, read, done, mma, of_a, of_b, bytes, meta[1], accumulators);
      multiply_next(pipeline, read, done, mma, of_a, of_b, bytes, meta[0], accumulators);
    }
    if (k_tiles > 0) multiply_next(pipeline, read, done, mma, of_a, of_b, bytes, meta[1], accumulators);
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
  }

 private:
  static constexpr int kRowBytes = 16;  // of metadata in a K tile, as format.h draws it
  static constexpr int kStageBytes = cute::size<0>(typename Stock::TileShape{}) * kRowBytes;
  static constexpr int kProductBytes = 8;  // of a row

  // Where a thread's metadata of the first product lies in a stage, as wgmma.sp reads it: lane q of a quad has 32
  // columns of row r + 8 (q & 1).
  CUTLASS_DEVICE static int first_byte(int thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + 8 * (thread & 1);
    return row * kRowBytes + 4 * (thread % 4 >> 1);
  }

  // Waits for a stage, and issues its products.
  template <class A, class B, class Metadata, class Accumulators>
  CUTLASS_DEVICE static void multiply(MainloopPipeline& pipeline, PipelineState& read, TiledMma& mma, A const& of_a,
                                      B const& of_b, const uint8_t* bytes, Metadata& meta, Accumulators& accumulators) {
    using namespace cute;
    pipeline.consumer_wait(read, pipeline.consumer_try_wait(read));
    const int stage = read.index();
    Tensor words = recast<uint32_t>(meta);
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(of_a); ++k)
      words(0, 0, k) = *reinterpret_cast<const uint32_t*>(bytes + stage * kStageBytes + k * kProductBytes);
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(of_a); ++k) {
      cute::gemm(mma, make_zip_tensor(of_a(_, _, k, stage), meta(_, _, k)), of_b(_, _, k, stage), accumulators);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++read;
  }

  // The same, with the stage before it: given back when its products are complete, before or behind these.
  template <class A, class B, class Metadata, class Accumulators>
  CUTLASS_DEVICE static void multiply_next(MainloopPipeline& pipeline, PipelineState& read, PipelineState& done,
                                           TiledMma& mma, A const& of_a, B const& of_b, const uint8_t* bytes,
                                           Metadata& meta, Accumulators& accumulators) {
    const auto status = pipeline.consumer_test_wait(read).get();
    const bool arrived = __all_sync(0xffffffffu, status == cutlass::BarrierStatus::WaitDone);
    if (!arrived) {
      cute::warpgroup_wait<0>();
      pipeline.consumer_release(done);
    }
    multiply(pipeline, read, mma, of_a, of_b, bytes, meta, accumulators);
    if (arrived) {
      cute::warpgroup_wait<1>();
      pipeline.consumer_release(done);
    }
    cute::warpgroup_fence_operand(accumulators);
    ++done;
  }
};

}  // namespace sparse24::cuda
