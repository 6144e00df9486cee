// The mainloop of a product over the rows of an expert (schedulers/over_rows_scheduler.cuh): what copies its operands,
// and what multiplies them.
//
// Rows of an expert begin anywhere, and copies of 64 rows go beyond its last. Those rows are the next expert's, or
// nobody's, and may be NaN: they are made zeros in shared memory, of both operands, before they are multiplied.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>

#include "gemm/sm90/mainloops/dense_mma.cuh"
#include "gemm/sm90/mainloops/tensor_map.cuh"

namespace sparse24::cuda {

// Base: the dense collective that CUTLASS builds for tiles of 128 rows, operands MN-major in 16 bits, K tiles of 64 and
// clusters of two CTAs along M. A stage has 64 rows of 128 bytes for each block of 64 columns of an operand.
template <class Base>
struct OverRowsMainloop : Base {
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TileShape;
  using Element = typename Base::ElementA;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileN = cute::size<1>(TileShape{});
  static constexpr int kTileK = cute::size<2>(TileShape{}), kColumns = 64, kBlock = kColumns * kTileK;
  static constexpr int kSharedRows = kTileK / 2;  // of a copy of b, which the cluster may share
  static_assert(sizeof(Element) == 2 && kTileK == 64 && kTileM % kColumns == 0 && kTileN % kColumns == 0,
                "blocks of 64 x 64");

  using Arguments = typename Base::Arguments;
  struct Params : Base::Params {
    cute::TmaDescriptor a, b;
  };

  // a [k, m], b [k, n]
  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, experts] = shape;
    const MapDim of_a[] = {{1, m, kColumns}, {m, k, kTileK}}, of_b[] = {{1, n, kColumns}, {n, k, kSharedRows}};
    constexpr const char* kWhat = "sparse24.experts_weight_gradient";
    return {Base::to_underlying_arguments(cute::make_shape(m, n, k, 1), args, workspace),
            map_rows(args.ptr_A, of_a, kWhat), map_rows(args.ptr_B, of_b, kWhat)};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(&params.a);
    cute::prefetch_tma_descriptor(&params.b);
  }

  template <class Inputs, class KTileIterator, class Place>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write, Inputs const&,
                           Place const& at, KTileIterator, int k_tiles, int, uint32_t rank, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    constexpr uint16_t kBoth = 3;
    const int column_b = at.n * kTileN;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int row = at.k_row; k_tiles > 0; --k_tiles, row += kTileK, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      Element* a = raw_pointer_cast(shared.smem_A.data()) + write.index() * (kTileM * kTileK);
      Element* b = raw_pointer_cast(shared.smem_B.data()) + write.index() * (kTileN * kTileK);
      CUTLASS_PRAGMA_UNROLL
      for (int column = 0; column < kTileN; column += kColumns) {
        if (at.shares_columns) {  // each CTA brings half of the rows for both
          SM90_TMA_LOAD_MULTICAST_2D::copy(&params.b, barrier, kBoth, kHint,
                                           b + column * kTileK + int(rank) * (kBlock / 2), column_b + column,
                                           row + int(rank) * kSharedRows);
        } else {
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half)
            SM90_TMA_LOAD_2D::copy(&params.b, barrier, kHint, b + column * kTileK + half * (kBlock / 2),
                                   column_b + column, row + half * kSharedRows);
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int column = 0; column < kTileM; column += kColumns) {
        SM90_TMA_LOAD_2D::copy(&params.a, barrier, kHint, a + column * kTileK, at.column + column, row);
      }
    }
  }
};

// What mainloops/dense_mma.cuh says, with as many rows of K as Registers::rows says.
template <class Mainloop, int kColumns>
struct OverRowsMma : DenseMma<Mainloop, kColumns> {
  using Base = DenseMma<Mainloop, kColumns>;
  using Element = typename Base::Element;
  struct Registers {
    int rows;  // from the next K tile on
  };
  template <class Of>
  struct Operands {
    Of of;
    Element *a, *b;
    int thread;  // of the warpgroup
    int warpgroup;
  };

  CUTLASS_DEVICE static auto operands(typename Mainloop::TensorStorage& shared, int thread) {
    const int warpgroup = __shfl_sync(0xffffffffu, thread / 128, 0);
    return Operands<decltype(Base::operands(shared, thread))>{
        Base::operands(shared, thread), cute::raw_pointer_cast(shared.smem_A.data()) + warpgroup * Mainloop::kBlock,
        cute::raw_pointer_cast(shared.smem_B.data()), thread % 128, warpgroup};
  }

  template <int kStep, class Of, class Pipeline, class State, class Accumulators, class Before>
  CUTLASS_DEVICE static void k_tile(Operands<Of> const& operands, Pipeline& pipeline, State& read, State& done,
                                    Registers& registers, Accumulators& accumulators, Before& before) {
    if (registers.rows < Base::kTileK) {
      pipeline.consumer_wait(read);
      clear(operands, read.index(), registers.rows);
    }
    registers.rows -= Base::kTileK;
    typename Base::Registers none;
    Base::template k_tile<kStep>(operands.of, pipeline, read, done, none, accumulators, before);
  }

 private:
  // Makes the rows from `first` on zeros: of the warpgroup's rows of d, and of all columns, which the other warpgroup
  // makes the same zeros.
  template <class Of>
  CUTLASS_DEVICE static void clear(Operands<Of> const& operands, int stage, int first) {
    constexpr int kChunks = Mainloop::kColumns / 8;  // of 16 bytes, in a row of a block
    Element* a = operands.a + stage * (Base::kTileM * Base::kTileK);
    Element* b = operands.b + stage * (kColumns * Base::kTileK);
    for (int i = first * kChunks + operands.thread; i < Base::kTileK * kChunks; i += 128) {
      *reinterpret_cast<uint4*>(a + 8 * i) = uint4{};
      CUTLASS_PRAGMA_UNROLL
      for (int block = 0; block < kColumns / Mainloop::kColumns; ++block)
        *reinterpret_cast<uint4*>(b + block * Mainloop::kBlock + 8 * i) = uint4{};
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(128, operands.warpgroup);
  }
};

}  // namespace sparse24::cuda
