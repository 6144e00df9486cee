// The consumer's half of CUTLASS's sparse mainloop, with the products of one K tile in flight while the next is issued.
//
// CUTLASS waits for all products of a K tile before it loads the metadata of the next one into the same registers. A K
// tile is two products of 256 cycles together, so the tensor cores wait wherever the two warpgroups do not take turns
// exactly. Here metadata has two sets of registers.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace sparse24::cuda {

// Stock: the collective that CUTLASS builds, whose loads, buffers and barriers stay as they are.
template <class Stock>
struct SparseMainloop : Stock {
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
    using Metadata = decltype(make_tensor<typename Stock::ElementEMma>(
        make_shape(_32{}, Int<size<1>(decltype(of_a){})>{}, Int<size<2>(decltype(of_a){})>{})));
    Metadata meta[2];
    const auto* bytes = reinterpret_cast<const uint8_t*>(raw_pointer_cast(shared.smem_E.begin())) + first_byte(thread);

    PipelineState done = read;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    warpgroup_fence_operand(accumulators);
    multiply(pipeline, read, mma, of_a, of_b, bytes, meta[0], accumulators);
    --k_tiles;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 1; k_tiles -= 2) {
      multiply(pipeline, read, mma, of_a, of_b, bytes, meta[1], accumulators);
      release(pipeline, done, accumulators);
      multiply(pipeline, read, mma, of_a, of_b, bytes, meta[0], accumulators);
      release(pipeline, done, accumulators);
    }
    if (k_tiles > 0) {
      multiply(pipeline, read, mma, of_a, of_b, bytes, meta[1], accumulators);
      release(pipeline, done, accumulators);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
  }

 private:
  static constexpr bool kFp8 = cute::sizeof_bits_v<typename Stock::ElementB> == 8;
  static constexpr int kRowBytes = kFp8 ? 16 : 8;  // of metadata in a K tile
  static constexpr int kStageBytes = cute::size<0>(typename Stock::TileShape{}) * kRowBytes;
  static constexpr int kNextProduct = kFp8 ? 8 : 4;

  // Where a thread's metadata of the first product lies in a stage, as format.h draws it and wgmma.sp reads it. 16-bit:
  // lane q of a quad has the first (q even) or second 16 columns of rows r and r + 8; fp8: 32 columns of row r + 8 (q &
  // 1).
  CUTLASS_DEVICE static int first_byte(int thread) {
    const int first = thread / 32 * 16, r = thread % 32 / 4, q = thread % 4;
    if (kFp8) return (first + r + 8 * (q & 1)) * kRowBytes + 4 * (q >> 1);
    return first * kRowBytes + 64 * (q & 1) + r * kRowBytes;
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
    for (int m = 0; m < size<1>(of_a); ++m) {
      const uint8_t* of_rows = bytes + stage * kStageBytes + m * size(mma) / 2 * kRowBytes;
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < size<2>(of_a); ++k)
        words(0, m, k) = *reinterpret_cast<const uint32_t*>(of_rows + k * kNextProduct);
    }
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

  // Gives back the stage before the last, when its products are complete.
  template <class Accumulators>
  CUTLASS_DEVICE static void release(MainloopPipeline& pipeline, PipelineState& done, Accumulators& accumulators) {
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
    ++done;
  }
};

}  // namespace sparse24::cuda
