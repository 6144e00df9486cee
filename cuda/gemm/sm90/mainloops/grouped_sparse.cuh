// A mainloop of products whose sparse operand, a weight, has features for rows, and tokens for columns: dy.T = w.T @
// grad.T, and h.T = w @ x.T. Rows of A are in an order in which a thread's fragment holds groups of four features
// whole: row 64 h + 16 w + 8 e + g of a tile of 128 is feature 2 h + e of group 8 w + g of the tile. Two copies of 64
// rows make a tile, one for each h, of a weight with features in their own order or in that of packed.h:
//
//     dimension                 values of A   g or g % 4   g / 4   e    w
//     rows apart, own order     -             4            -       1    32      begins at row 2 h
//                 packed        -             2            16      8    32                    h
//
// The rows of B are tokens as they lie; or, where groups of four tokens are selected too, row 16 j + 8 h + 2 q + e is
// token 2 h + e of group 4 j + q of the tile, whose tokens are neighbours, or a quarter of all tokens apart:
//
//     dimension      columns of B  e    q    h    j
//     of one copy    128 bytes     2    4    2    6             (128 bytes x 96 rows, for both CTAs of the cluster)
//
// The metadata of A stays in the order of the weight's rows, as format.h draws it: a thread reads that of its group.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/cuda_host_adapter.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>

#include "gemm/sm90/mainloops/metadata_reader.cuh"
#include "gemm/sm90/mainloops/tensor_map.cuh"
#include "sparse24/packed.h"

namespace sparse24::cuda {

// The tokens of B: how many there are; and, where they are in groups, rows between those of a group and between groups.
struct GroupedTokens {
  int64_t count;
  int64_t token = 1, group = 4;
};

// Base: the sparse collective that CUTLASS builds for pingpong, K-major operands and clusters of two CTAs along M,
// which share the tokens. Its buffers and barriers, and the copies of the metadata, stay as they are. kGroupsTokens: of
// tokens too; then the weight's features are in their own order, and else in that of packed.h.
template <class Base, bool kGroupsTokens>
struct GroupedSparseMainloop : Base {
  using typename Base::ElementB;
  using typename Base::MainloopPipeline;
  using typename Base::PipelineState;
  using typename Base::TensorStorage;
  using typename Base::TiledMma;
  using typename Base::TileShape;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileN = cute::size<1>(TileShape{});
  static constexpr int kTileK = cute::size<2>(TileShape{});
  static_assert(kTileM == 128 && kTileN % 32 == 0 && kTileK * sizeof(ElementB) == 128, "whole copies");
  static_assert(cute::size<0>(typename Base::DispatchPolicy::ClusterShape{}) == 2 &&
                    cute::size<1>(typename Base::DispatchPolicy::ClusterShape{}) == 1,
                "two CTAs share the tokens");
  static_assert(Base::DispatchPolicy::Stages >= 3, "a K tile is awaited before the one before it is multiplied");

  struct Arguments : Base::Arguments {
    GroupedTokens order;
  };
  struct Params : Base::Params {
    cute::TmaDescriptor features[2], tokens;
  };

  template <class ProblemShape>
  static Params to_underlying_arguments(ProblemShape const& shape, Arguments const& args, void* workspace) {
    const auto [m, n, k, l] = shape;
    const int64_t row = k / 2, ld = cute::get<0>(args.dB), groups = m / kGroupedFeatures;
    const auto* values = reinterpret_cast<const ElementB*>(args.ptr_A);
    const MapDim own[] = {{1, row, kTileK / 2}, {4 * row, 8, 8}, {row, 1, 1}, {row, 2, 2}, {32 * row, groups, 4}};
    const MapDim packed[] = {
        {1, row, kTileK / 2}, {2 * row, 4, 4}, {16 * row, 2, 2}, {8 * row, 2, 2}, {32 * row, groups, 4}};
    const auto& features = kGroupsTokens ? own : packed;
    const MapDim grouped[] = {{1, k, kTileK},
                              {args.order.token * ld, 2, 2},
                              {args.order.group * ld, 4, 4},
                              {2 * args.order.token * ld, 2, 2},
                              {4 * args.order.group * ld, args.order.count / kGroupedTokens, kTileN / 32}};
    const MapDim rows[] = {{1, k, kTileK}, {ld, args.order.count, kTileN / 2}, {ld, 1, 1}, {ld, 1, 1}, {ld, 1, 1}};
    return {Base::to_underlying_arguments(shape, args, workspace),
            {map_half_rows(values, features), map_half_rows(values + (kGroupsTokens ? 2 : 1) * row, features)},
            map_rows(args.ptr_B, kGroupsTokens ? grouped : rows, kWhat)};
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(Params const& params) {
    cute::prefetch_tma_descriptor(&params.features[0]);
    cute::prefetch_tma_descriptor(&params.features[1]);
    cute::prefetch_tma_descriptor(&params.tokens);
    cute::prefetch_tma_descriptor(params.tma_load_e.get_tma_descriptor());
  }

  template <class Inputs, class KTileIterator, class BlockCoord>
  CUTLASS_DEVICE void load(Params const& params, MainloopPipeline pipeline, PipelineState write, Inputs const& inputs,
                           BlockCoord const& coord, KTileIterator k_tile, int k_tiles, int, uint32_t rank_in_cluster,
                           TensorStorage& shared) {
    using namespace cute;
    if (!elect_one_sync()) return;
    const auto [m, n, _k, l] = coord;
    const auto copy_e = params.tma_load_e.get_slice(0);
    const Tensor from_e = copy_e.partition_S(get<2>(inputs)(_, _, m, _, l));  // (TMA, TMA_M, TMA_K, k)
    const Tensor to_e =
        copy_e.partition_D(make_tensor(make_smem_ptr(shared.smem_E.begin()), typename Base::SmemLayoutE{}));
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    constexpr uint16_t kBoth = 3;
    char* const a = reinterpret_cast<char*>(&shared.smem_A);
    char* const b = reinterpret_cast<char*>(&shared.smem_B) + rank_in_cluster * (kBytesB / 2);
    // 16 tokens a step where they are in groups.
    const int first = (2 * int(n) + int(rank_in_cluster)) * (kTileN / (kGroupsTokens ? 32 : 2));
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k_tiles > 0; --k_tiles, ++k_tile, ++write) {
      pipeline.producer_acquire(write);
      auto* barrier = pipeline.producer_get_barrier(write);
      // B first: the other CTA waits for its half.
      SM90_TMA_LOAD_MULTICAST_5D::copy(&params.tokens, barrier, kBoth, kHint, b + write.index() * kBytesB,
                                       int(*k_tile) * kTileK, kGroupsTokens ? 0 : first, 0, 0,
                                       kGroupsTokens ? first : 0);
      CUTLASS_PRAGMA_UNROLL
      for (int h = 0; h < 2; ++h) {
        SM90_TMA_LOAD_5D::copy(&params.features[h], barrier, kHint, a + write.index() * kBytesA + h * (kBytesA / 2),
                               int(*k_tile) * (kTileK / 2), 0, 0, 0, int(m) * (kTileM / 32));
      }
      copy(params.tma_load_e.with(*barrier, 0), from_e(_, _, _, *k_tile), to_e(_, _, _, write.index()));
    }
  }

  // The mma of a K tile are in flight while those of the next are issued. One warpgroup has nothing else that hides a
  // load from shared memory, which takes 200 cycles behind the mma's own: so the metadata of a K tile is on its way
  // since the mma of the one before the last were issued.
  template <class Accumulators>
  CUTLASS_DEVICE void mma(MainloopPipeline pipeline, PipelineState read, Accumulators& accumulators, int k_tiles,
                          int thread, TensorStorage& shared, Params const&) {
    using namespace cute;
    const Tensor stages_a = make_tensor(make_smem_ptr(shared.smem_A.begin()), typename Base::SmemLayoutA{});
    const Tensor stages_b = make_tensor(make_smem_ptr(shared.smem_B.begin()), typename Base::SmemLayoutB{});
    const auto slice = TiledMma{}.get_slice(0);
    const auto a = slice.make_fragment_A(slice.partition_A(stages_a));  // (MMA, M, K, stage)
    const auto b = slice.make_fragment_B(slice.partition_B(stages_b));  // (MMA, N, K, stage)
    const auto* e = reinterpret_cast<const uint8_t*>(&shared.smem_E);
    using Reader = MetadataReader<kGroupsTokens, kFp8>;
    const Reader reader(thread, k_tiles >> 30);  // a zero that the compiler does not know
    PipelineState done = read, ahead = read;
    typename Reader::Words words;
    Metadata metadata[2];
    TiledMma mma;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    int left = k_tiles, loads = k_tiles;  // K tiles to multiply, and those whose metadata is to be loaded
    const auto load = [&] {
      if (loads > 0) {
        pipeline.consumer_wait(ahead, pipeline.consumer_try_wait(ahead));
        reader.load(e + ahead.index() * kBytesE, words);
        ++ahead;
      }
      --loads;
    };
    const auto multiply = [&](Metadata& of_tile, Metadata& of_next) {
      warpgroup_fence_operand(accumulators);
      warpgroup_arrive();
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < kMmas; ++k) {
        cute::gemm(mma, make_zip_tensor(a(_, _, k, read.index()), of_tile(_, _, k)), b(_, _, k, read.index()),
                   accumulators);
        mma.accumulate_ = GMMA::ScaleOut::One;
      }
      warpgroup_commit_batch();
      ++read;
      warpgroup_wait<1>();
      warpgroup_fence_operand(accumulators);
      reader.arrange(words, of_next);
      if (left < k_tiles) {
        pipeline.consumer_release(done);
        ++done;
      }
      load();
      --left;
    };
    load();
    reader.arrange(words, metadata[0]);
    metadata[1] = metadata[0];
    load();
    CUTLASS_PRAGMA_NO_UNROLL
    while (left > 1) {
      multiply(metadata[0], metadata[1]);
      multiply(metadata[1], metadata[0]);
    }
    if (left > 0) multiply(metadata[0], metadata[1]);
  }

  CUTLASS_DEVICE void mma_tail(MainloopPipeline pipeline, PipelineState last, int k_tiles) {
    last.advance(k_tiles - 1);
    cute::warpgroup_wait<0>();
    pipeline.consumer_release(last);
  }

 protected:
  static constexpr const char* kWhat = "sparse24: a product with a packed weight";
  static constexpr int kBytesA = kTileM * kTileK / 2 * int(sizeof(ElementB));  // of a stage
  static constexpr int kBytesB = kTileN * kTileK * int(sizeof(ElementB));
  static constexpr int kBytesE = kTileM * kTileK / 8;
  static constexpr int kMmas = 2;  // in a K tile
  static constexpr bool kFp8 = sizeof(ElementB) == 1;
  // A word for each of two times 64 rows and of two mma.
  using Metadata = decltype(cute::make_tensor<typename Base::ElementEMma>(
      cute::make_shape(cute::_32{}, cute::_2{}, cute::Int<kMmas>{})));

  // As map_rows, of rows of 64 bytes.
  static cute::TmaDescriptor map_half_rows(const ElementB* start, const MapDim (&dims)[5]) {
    cuuint64_t sizes[5], strides[5];
    cuuint32_t box[5], every[5];
    for (int i = 0; i < 5; ++i) {
      sizes[i] = cuuint64_t(dims[i].size);
      strides[i] = sizeof(ElementB) * cuuint64_t(dims[i].stride);
      box[i] = cuuint32_t(dims[i].box);
      every[i] = 1;
    }
    cute::TmaDescriptor map{};
    const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
        &map, kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<ElementB*>(start),
        sizes, strides + 1, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    check(result == CUDA_SUCCESS, kWhat, ": cuTensorMapEncodeTiled failed with error ", int(result));
    return map;
  }
};

}  // namespace sparse24::cuda
