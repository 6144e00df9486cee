// The producer's half of CUTLASS's dense mainloop, with the rows of w in the order of lane_runs.cuh.
//
// A tensor map of five dimensions says where they lie; the whole blocks of w have one, its last rows, if they are no
// block, another, so that what is read beyond them is zeros:
//
//     dimension        columns of w   e    q                p               block
//     rows apart       -              1    kRun             2               4 kRun
//     size, blocks     K              2    4                kRun / 2        rows / (4 kRun)
//           last       K              2    runs that are    kRun / 2        1
//     of one copy      128 bytes      2    4                kRun / 2, or    1
//                                                           half of them
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "lane_runs.cuh"
#include "tensor_map.cuh"

namespace sparse24::cuda {

// Stock: the collective that CUTLASS builds for K-major operands, K tiles of 128 bytes and clusters of two CTAs. Two
// along M share the rows of w, of which each loads half of the blocks for both, or where they are odd in number half of
// every block; two along N share those of x. Its buffers, barriers and products, and the copies of x, stay as they are.
template <class Stock, class Runs>
struct LaneRunsMainloop : Stock {
  using typename Stock::MainloopPipeline;
  using typename Stock::PipelineState;
  using typename Stock::TensorStorage;
  using typename Stock::TileShape;
  using Element = typename Stock::ElementB;
  using Cluster = typename Stock::DispatchPolicy::ClusterShape;
  static constexpr int kTileN = cute::size<1>(TileShape{}), kTileK = cute::size<2>(TileShape{});
  static constexpr bool kShared = cute::size<0>(Cluster{}) == 2;  // the rows of w
  static constexpr int kBlocks = kTileN / Runs::kBlock;
  static constexpr bool kHalfBlocks = kShared && kBlocks % 2 != 0;
  static constexpr int kPairs = Runs::kPairs / (kHalfBlocks ? 2 : 1);              // of one copy
  static constexpr int kCopies = kShared && !kHalfBlocks ? kBlocks / 2 : kBlocks;  // of one CTA
  static_assert(kTileK * sizeof(Element) == 128 && kTileN % Runs::kBlock == 0, "whole blocks, rows of 128 bytes");
  static_assert(cute::size(Cluster{}) == 2, "two CTAs share one operand");

  using Arguments = typename Stock::Arguments;
  struct Params : Stock::Params {
    cute::TmaDescriptor blocks, last;
    int whole;  // blocks
    bool more;  // rows than those
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    constexpr int kUnit = 2 / sizeof(Element);  // elements of a map's 16 bits
    const int64_t ld = cute::get<0>(args.dB) / kUnit, columns = k / kUnit;
    const int whole = n / Runs::kBlock, runs = n % Runs::kBlock / Runs::kRun;
    const auto map = [&](const Element* first, int64_t lanes, int64_t count) {
      // No dimension may be empty; one that is serves no copy.
      const MapDim dims[] = {{1, columns, 64},
                             {ld, 2, 2},
                             {Runs::kRun * ld, cute::max(lanes, int64_t{1}), 4},
                             {2 * ld, Runs::kPairs, kPairs},
                             {Runs::kBlock * ld, cute::max(count, int64_t{1}), 1}};
      return map_16bit(first, dims, "sparse24.linear");
    };
    const Element* last = args.ptr_B + int64_t{whole} * Runs::kBlock * cute::get<0>(args.dB);
    return {Stock::to_underlying_arguments(shape, args, workspace), map(args.ptr_B, 4, whole), map(last, runs, 1),
            whole, runs > 0};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(params.tma_load_a.get_tma_descriptor());
    cute::prefetch_tma_descriptor(&params.blocks);
    if (params.more) cute::prefetch_tma_descriptor(&params.last);
  }

  template <class TensorA, class TensorB, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write,
                           cute::tuple<TensorA, TensorB> const& inputs, BlockCoord const& coord, KTileIterator k_tile,
                           int k_tiles, int, uint32_t rank_in_cluster, TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const Tensor a = make_tensor(make_smem_ptr(shared.smem_A.data()), typename Stock::SmemLayoutA{});
    const auto [m, n, _k, l] = coord;
    const auto copy_a = params.tma_load_a.get_slice(kShared ? 0 : int(rank_in_cluster));
    const Tensor from_a = copy_a.partition_S(get<0>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor to_a = copy_a.partition_D(a);                                // (TMA, TMA_M, TMA_K, stage)
    constexpr uint16_t kBoth = 3;
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    const int pair = kHalfBlocks ? int(rank_in_cluster) * kPairs : 0;
    const int skipped = kShared && !kHalfBlocks ? int(rank_in_cluster) * kCopies : 0;  // blocks
    const int first = int(n) * kBlocks + skipped;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      copy(params.tma_load_a.with(*barrier, kShared ? uint16_t{0} : kBoth), from_a(_, _, _, *k_tile),
           to_a(_, _, _, write.index()));
      Element* b = raw_pointer_cast(shared.smem_B.data()) +
                   (write.index() * kTileN + skipped * Runs::kBlock + 8 * pair) * kTileK;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCopies; ++i, b += Runs::kBlock * kTileK) {
        const bool last = params.more && first + i == params.whole;
        const auto* map = last ? &params.last : &params.blocks;
        const int block = last ? 0 : first + i, column = int(*k_tile) * 64;
        if constexpr (kShared) {
          SM90_TMA_LOAD_MULTICAST_5D::copy(map, barrier, kBoth, kHint, b, column, 0, 0, pair, block);
        } else {
          SM90_TMA_LOAD_5D::copy(map, barrier, kHint, b, column, 0, 0, pair, block);
        }
      }
    }
  }
};

}  // namespace sparse24::cuda
