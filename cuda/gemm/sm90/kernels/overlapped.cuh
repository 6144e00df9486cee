// A GEMM for Hopper whose epilogue runs under the next tile's products.
//
// Two warpgroups share a tile of 128 x 256, which moves the least through shared memory of all tiles: 128 bytes a cycle
// at the tensor cores' full rate, as many as there are. Its accumulators take 128 registers of each thread. Those of a
// second tile do not fit beside them, and an epilogue between two tiles leaves the tensor cores idle. So each thread
// takes the accumulators as 16-bit numbers, in 64 registers, and finishes them in steps (epilogues/steps.cuh), one
// behind the products of each of the next tile's first K tiles:
//
//     tensor cores     k 0 | k 1 | k 2 | ... | k last |        | k 0       | k 1       | k 2       | ...
//     threads                                         | take() | finish<0> | finish<1> | finish<2> | ...
//
// A step that takes longer than the other warpgroup's products leaves the tensor cores idle too: steps are short.
// Barriers and copies are CUTLASS's, the order of tiles is that of schedulers/tile_bands.cuh. Before all that come
// quarters of the tiles that would make a ragged last round (schedulers/tile_rounds.cuh): tiles of 128 x 64, each with
// its epilogue behind its products.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/gemm/kernel/tile_scheduler_params.h>

#include <cutlass/pipeline/pipeline.hpp>

#include "gemm/sm90/epilogues/steps.cuh"
#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/mainloops/dense_products.cuh"
#include "gemm/sm90/schedulers/tile_rounds.cuh"

namespace sparse24::cuda {

// As many stages as fit beside the terms; barriers and alignment take less than 1 KB.
template <class Epilogue>
using OverlappedStages =
    cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(TermsStages<typename Epilogue::Terms>)) +
                                                      1024>;

// Tiles are not divided.
struct Undivided {
  static constexpr int kParts = 1;
};

// Quarters of the columns. Mainloop: its load() brings parts of B too (mainloops/lane_runs_mainloop.cuh).
template <class Mainloop, class WholeEpilogue>
struct Quarters {
  static constexpr int kParts = 4, kColumns = cute::size<1>(typename Mainloop::TileShape{}) / kParts;
  using Products = DenseProducts<Mainloop, kColumns>;
  using Epilogue = typename WholeEpilogue::template WithColumns<kColumns>;
};

// Mainloop: one for two warpgroups that CUTLASS builds, of which this takes the loads and the types. Products: what
// multiplies its stages (mainloops/dense_products.cuh). Parts: Undivided, or Quarters.
template <class Mainloop_, class Products, class Epilogue, class Parts>
class OverlappedGemm {
 public:
  using Mainloop = Mainloop_;
  using TileShape = typename Mainloop::TileShape;
  using ClusterShape = typename Mainloop::DispatchPolicy::ClusterShape;
  using Problem = cute::Shape<int, int, int, int>;

 private:
  using Pipeline = typename Mainloop::MainloopPipeline;
  using PipelineState = typename Mainloop::PipelineState;
  using Terms = TermsStages<typename Epilogue::Terms>;
  using TermsPipeline = cutlass::PipelineAsync<Terms::kCount>;
  static constexpr int kClusterSize = cute::size<0>(ClusterShape{});
  static_assert(cute::size(ClusterShape{}) == kClusterSize, "a cluster lies along M");
  using Rounds = TileRounds<kClusterSize, Parts::kParts>;
  static constexpr bool kDivides = Parts::kParts > 1;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileN = cute::size<1>(TileShape{});
  static constexpr int kConsumers = 256;
  struct NoSteps {
    static constexpr int kSteps = 1;
    CUTLASS_DEVICE bool counts() const { return false; }
    template <int kStep, bool kCounts>
    CUTLASS_DEVICE void finish() {}
  };

  struct SharedStorage {
    alignas(1024) typename Mainloop::TensorStorage operands;
    alignas(16) Terms terms;
    alignas(16) typename Pipeline::SharedStorage pipeline;
    alignas(16) typename TermsPipeline::SharedStorage terms_pipeline;
  };

 public:
  static constexpr int SharedStorageSize = sizeof(SharedStorage);
  static constexpr uint32_t MaxThreadsPerBlock = 128 + kConsumers, MinBlocksPerMultiprocessor = 1;

  struct Arguments {
    cutlass::gemm::GemmUniversalMode mode;
    Problem problem;
    typename Mainloop::Arguments mainloop;
    typename Epilogue::Params epilogue;
    cutlass::KernelHardwareInfo hw_info{};
    struct {
      int max_swizzle_size;  // the most clusters across a band
      cutlass::gemm::kernel::detail::RasterOrderOptions raster_order;
    } scheduler{};
    bool divides = false;  // the tiles that whole rounds leave over
  };
  struct Params {
    Problem problem;
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    TileBands bands;
    uint32_t ctas, divided;  // divided: tiles
  };

  static Params to_underlying_arguments(const Arguments& args, void*) {
    const auto [m, n, k, batches] = args.problem;
    const bool along_m = args.scheduler.raster_order == cutlass::gemm::kernel::detail::RasterOrderOptions::AlongM;
    const TileBands bands(cute::ceil_div(m, kTileM * kClusterSize), cute::ceil_div(n, kTileN),
                          args.scheduler.max_swizzle_size, along_m);
    const uint32_t ctas = cute::min(args.hw_info.sm_count / kClusterSize, bands.clusters()) * kClusterSize;
    const uint32_t divided = kDivides && args.divides ? Rounds::left_over(bands, ctas) : 0;
    return {args.problem,  Mainloop::to_underlying_arguments(args.problem, args.mainloop, nullptr),
            args.epilogue, bands,
            ctas,          divided};
  }
  static dim3 get_grid_shape(const Params& p) { return dim3(p.ctas); }
  static dim3 get_block_shape() { return dim3(MaxThreadsPerBlock); }

  CUTLASS_DEVICE void operator()(Params const& params, char* shared) const {
    using namespace cute;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int warp = cutlass::canonical_warp_idx_sync();
    const bool consumes = warp >= 4, loads = warp == 0, fetches = warp == 2;
    if (loads && elect_one_sync()) Mainloop::prefetch_tma_descriptors(params.mainloop);

    typename Pipeline::Params of_operands{};
    of_operands.role = consumes ? Pipeline::ThreadCategory::Consumer
                       : loads  ? Pipeline::ThreadCategory::Producer
                                : Pipeline::ThreadCategory::NonParticipant;
    of_operands.is_leader = threadIdx.x % 128 == 0;
    of_operands.num_consumers = kConsumers;
    of_operands.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(storage.pipeline, of_operands, ClusterShape{});

    typename TermsPipeline::Params of_terms{};
    of_terms.role = consumes  ? TermsPipeline::ThreadCategory::Consumer
                    : fetches ? TermsPipeline::ThreadCategory::Producer
                              : TermsPipeline::ThreadCategory::NonParticipant;
    of_terms.producer_arv_count = 32;
    of_terms.consumer_arv_count = kConsumers;
    of_terms.dst_blockid = block_rank_in_cluster();
    TermsPipeline terms_pipeline(storage.terms_pipeline, of_terms);

    // The whole cluster sees the barriers, and all threads what the kernel before this one wrote.
    cluster_arrive_relaxed();
    cluster_wait();
    cutlass::arch::wait_on_dependent_grids();

    if (consumes) {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(params, storage, pipeline, terms_pipeline);
    } else {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (loads) {
        if constexpr (kDivides) of_operands.transaction_bytes = Parts::Products::kBytes;
        Pipeline of_parts(storage.pipeline, of_operands, ClusterShape{}, false_type{}, false_type{});
        load(params, storage, pipeline, of_parts);
      }
      if (fetches) fetch(params, storage, terms_pipeline);
    }
  }

 private:
  // At least one for each step: what lies beyond K is read as zeros.
  CUTLASS_DEVICE static int k_tiles(Params const& params) {
    return cute::max(cute::ceil_div(cute::get<2>(params.problem), cute::get<2>(TileShape{})), int(Epilogue::kSteps));
  }

  CUTLASS_DEVICE static Rounds rounds_of(Params const& params) {
    return {params.bands, params.divided, blockIdx.x, params.ctas};
  }

  // One warp: the operands of every part and tile.
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& storage, Pipeline& of_tiles,
                                  Pipeline& of_parts) {
    using namespace cute;
    const Rounds rounds = rounds_of(params);
    Mainloop mainloop;
    const auto operands = mainloop.load_init(params.problem, params.mainloop);
    auto state = cutlass::make_producer_start_state<Pipeline>();
    const int count = k_tiles(params);
    const auto one = [&](auto const& at, auto load) {
      load(make_coord(at.m, at.n, _, 0), make_coord_iterator(shape<3>(get<0>(operands))));
      state.advance(count);
    };
    if constexpr (kDivides) {
      for (uint32_t i = rounds.first(); rounds.has_part(i); i += rounds.stride()) {
        one(rounds.part(i), [&](auto const& at, auto k) {
          mainloop.template load<Parts::kColumns>(params.mainloop, of_parts, state, operands, at, k, count, threadIdx.x,
                                                  block_rank_in_cluster(), storage.operands);
        });
      }
    }
    for (uint32_t i = rounds.first(); rounds.has_tile(i); i += rounds.stride()) {
      one(rounds.tile(i), [&](auto const& at, auto k) {
        mainloop.load(params.mainloop, of_tiles, state, operands, at, k, count, threadIdx.x, block_rank_in_cluster(),
                      storage.operands);
      });
    }
    mainloop.load_tail(of_tiles, state);
  }

  // Another: the epilogue's terms.
  CUTLASS_DEVICE static void fetch(Params const& params, SharedStorage& storage, TermsPipeline& pipeline) {
    const Rounds rounds = rounds_of(params);
    auto state = cutlass::make_producer_start_state<TermsPipeline>();
    const auto one = [&](int m, int n) {
      pipeline.producer_acquire(state);
      Epilogue::fetch(params.epilogue, threadIdx.x % 32, m, n, storage.terms.stage[state.index()]);
      pipeline.producer_commit(state);
      ++state;
    };
    if constexpr (kDivides) {
      for (uint32_t i = rounds.first(); rounds.has_part(i); i += rounds.stride()) {
        const auto at = rounds.part(i);
        one(at.m * kTileM, at.n * Parts::kColumns);  // of more columns than the part has
      }
    }
    for (uint32_t i = rounds.first(); rounds.has_tile(i); i += rounds.stride()) {
      const auto at = rounds.tile(i);
      one(at.m * kTileM, at.n * kTileN);
    }
    pipeline.producer_tail(state);
  }

  // Two warpgroups: products and epilogues.
  CUTLASS_DEVICE static void consume(Params const& params, SharedStorage& storage, Pipeline& pipeline,
                                     TermsPipeline& terms_pipeline) {
    using namespace cute;
    const Rounds rounds = rounds_of(params);
    const int thread = threadIdx.x - 128;
    const int row = thread / 32 * 16 + thread % 32 / 4;  // of the fragment, in the tile
    const int count = k_tiles(params);
    PipelineState state;
    cutlass::PipelineState<Terms::kCount> terms;

    // Where a tile lies is found while its last products run.
    if constexpr (kDivides) {
      for (uint32_t i = rounds.first(); rounds.has_part(i); i += rounds.stride()) {
        auto accumulators = Parts::Products::accumulators();
        NoSteps before;
        PipelineState done =
            multiply<typename Parts::Products>(storage, pipeline, state, accumulators, count, thread, before);
        const auto at = rounds.part(i);
        typename Parts::Epilogue epilogue(params.epilogue);
        take_tile(epilogue, at.m * kTileM, at.n * Parts::kColumns, row, accumulators, storage, pipeline, done,
                  terms_pipeline, terms);
        finish_all(epilogue);
      }
    }

    Epilogue epilogue(params.epilogue);
    auto accumulators = Products::accumulators();
    for (uint32_t i = rounds.first(); rounds.has_tile(i); i += rounds.stride()) {
      PipelineState done = multiply<Products>(storage, pipeline, state, accumulators, count, thread, epilogue);
      const auto at = rounds.tile(i);
      take_tile(epilogue, at.m * kTileM, at.n * kTileN, row, accumulators, storage, pipeline, done, terms_pipeline,
                terms);
    }
    cutlass::arch::launch_dependent_grids();
    finish_all(epilogue);
  }

  // The first terms are read under the last products, whose stage is `done`.
  template <class E, class Accumulators>
  CUTLASS_DEVICE static void take_tile(E& epilogue, int m, int n, int row, Accumulators& accumulators,
                                       SharedStorage& storage, Pipeline& pipeline, PipelineState& done,
                                       TermsPipeline& terms_pipeline, cutlass::PipelineState<Terms::kCount>& terms) {
    using namespace cute;
    terms_pipeline.consumer_wait(terms);
    AccumulatorScales<typename Epilogue::Terms> scales(storage.terms.stage[terms.index()], row);
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
    epilogue.take(m, n, accumulators(_, _0{}, _0{}), scales);
    terms_pipeline.consumer_release(terms);
    ++terms;
  }

  // One tile's products, with the steps of the tile before it. The last run when this returns: the state of their
  // stage.
  template <class P, class Accumulators, class Before>
  CUTLASS_DEVICE static PipelineState multiply(SharedStorage& storage, Pipeline& pipeline, PipelineState& state,
                                               Accumulators& accumulators, int count, int thread, Before& before) {
    constexpr int kSteps = Before::kSteps;
    const auto operands = P::operands(storage.operands, thread);
    typename P::Registers registers;
    PipelineState done = state;
    multiply_and_finish<P, 0>(operands, pipeline, state, done, registers, accumulators, before);
    int k = kSteps;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k + 1 < count; k += 2) {
      P::template k_tile<kSteps>(operands, pipeline, state, done, registers, accumulators, before);
      P::template k_tile<kSteps + 1>(operands, pipeline, state, done, registers, accumulators, before);
    }
    if (k < count) P::template k_tile<kSteps>(operands, pipeline, state, done, registers, accumulators, before);
    return done;
  }

  template <class P, int kStep, class Operands, class Accumulators, class Before>
  CUTLASS_DEVICE static void multiply_and_finish(Operands const& operands, Pipeline& pipeline, PipelineState& state,
                                                 PipelineState& done, typename P::Registers& registers,
                                                 Accumulators& accumulators, Before& before) {
    if constexpr (kStep < Before::kSteps) {
      P::template k_tile<kStep>(operands, pipeline, state, done, registers, accumulators, before);
      multiply_and_finish<P, kStep + 1>(operands, pipeline, state, done, registers, accumulators, before);
    }
  }
};

}  // namespace sparse24::cuda
