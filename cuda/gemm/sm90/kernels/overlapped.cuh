// A persistent GEMM for Hopper whose epilogue runs under the next tile's mma.
//
// Two warpgroups share a tile of 128 x 256, which moves the least through shared memory of all tiles: 128 bytes a cycle
// at the tensor cores' full rate, as many as there are. Its accumulators take 128 registers of each thread. Those of a
// second tile do not fit beside them, and an epilogue between two tiles leaves the tensor cores idle. So each thread
// takes the accumulators as 16-bit numbers, in 64 registers, and finishes them in steps (epilogues/steps.cuh), one
// behind the mma of each of the next tile's first K tiles:
//
//     tensor cores     k 0 | k 1 | k 2 | ... | k last |        | k 0      | k 1      | k 2      | ...
//     threads                                         | begin  | visit<0> | visit<1> | visit<2> | ...
//
// A step that takes longer than the other warpgroup's mma leaves the tensor cores idle too: steps are short. Barriers
// and copies are CUTLASS's; the scheduler (schedulers/scheduler.cuh) says which tiles a CTA has. Where it splits the
// tiles of a ragged last wave, their quarters come before all whole tiles: they are tiles of 128 x 64, each with its
// epilogue behind its own mma.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cutlass/pipeline/pipeline.hpp>

#include "gemm/sm90/epilogues/steps.cuh"
#include "gemm/sm90/kernels/gemm.cuh"
#include "gemm/sm90/kernels/split_tiles.cuh"
#include "gemm/sm90/schedulers/handed_places.cuh"
#include "gemm/sm90/schedulers/scheduler.cuh"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

// So many stages fit beside the epilogue's operands; barriers and alignment take less than 1 KB.
template <class Epilogue>
using OverlappedStages = cutlass::gemm::collective::StageCountAutoCarveout<
    static_cast<int>(sizeof(OperandStages<typename Epilogue::Operands>)) + 1024>;

// Mainloop: one for two warpgroups that CUTLASS builds, of which this kernel takes the loads and the types. Mma: what
// multiplies its stages (mainloops/dense_mma.cuh). Split: WholeTiles or SplitTiles, as the scheduler has it.
template <class Mainloop_, class Mma, class Epilogue, class Split, class Scheduler>
class OverlappedGemm {
 public:
  using Mainloop = Mainloop_;
  using TileShape = typename Mainloop::TileShape;
  using ClusterShape = typename Mainloop::DispatchPolicy::ClusterShape;
  using Problem = cute::Shape<int, int, int, int>;

 private:
  using Pipeline = typename Mainloop::MainloopPipeline;
  using PipelineState = typename Mainloop::PipelineState;
  using EpilogueStages = OperandStages<typename Epilogue::Operands>;
  using EpiloguePipeline = cutlass::PipelineAsync<EpilogueStages::kCount>;
  static constexpr int kClusterSize = cute::size<0>(ClusterShape{});
  static_assert(cute::size(ClusterShape{}) == kClusterSize, "a cluster lies along M");
  static_assert(Scheduler::kParts == Split::kParts, "the kernel multiplies what the scheduler splits");
  static constexpr bool kSplits = Split::kParts > 1;
  static constexpr int kTileM = cute::size<0>(TileShape{}), kTileN = cute::size<1>(TileShape{});
  static constexpr int kConsumers = 256;
  using Handed = HandedPlaces<Scheduler, EpilogueStages::kCount>;
  struct SharedStorage : Scheduler::Shared, Handed {
    alignas(1024) typename Mainloop::TensorStorage operands;
    alignas(16) EpilogueStages epilogue;
    alignas(16) typename Pipeline::SharedStorage pipeline;
    alignas(16) typename EpiloguePipeline::SharedStorage epilogue_pipeline;
  };

 public:
  static constexpr int SharedStorageSize = sizeof(SharedStorage);
  static constexpr uint32_t MaxThreadsPerBlock = 128 + kConsumers, MinBlocksPerMultiprocessor = 1;

  struct Arguments {
    Problem problem;
    typename Mainloop::Arguments mainloop;
    typename Epilogue::Params epilogue;
    GemmConfig config{};
    int multiprocessors = 0;
    const int32_t* offsets = nullptr;  // where the problem's batches are experts: where their rows end
  };
  struct Params {
    Problem problem;
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    typename Scheduler::Params scheduler;
  };

  static Params params(const Arguments& args) {
    const auto [m, n, k, batches] = args.problem;
    const ResultShape shape{m, n, batches, kTileM, kTileN, args.offsets, k};
    return {args.problem, Mainloop::to_underlying_arguments(args.problem, args.mainloop, nullptr), args.epilogue,
            Scheduler::params(shape, args.config, args.multiprocessors)};
  }
  static dim3 grid(const Params& params) { return Scheduler::grid(params.scheduler); }

  CUTLASS_DEVICE void operator()(Params const& params, char* shared) const {
    using namespace cute;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int warp = cutlass::canonical_warp_idx_sync();
    const bool consumes = warp >= 4, loads = warp == 0, fetches = warp == 2;
    if (loads && elect_one_sync()) Mainloop::prefetch_tma_descriptors(params.mainloop);

    typename Pipeline::Params pipeline_params{};
    pipeline_params.role = consumes ? Pipeline::ThreadCategory::Consumer
                           : loads  ? Pipeline::ThreadCategory::Producer
                                    : Pipeline::ThreadCategory::NonParticipant;
    pipeline_params.is_leader = threadIdx.x % 128 == 0;
    pipeline_params.num_consumers = kConsumers;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(storage.pipeline, pipeline_params, ClusterShape{});

    typename EpiloguePipeline::Params epilogue_params{};
    epilogue_params.role = consumes  ? EpiloguePipeline::ThreadCategory::Consumer
                           : fetches ? EpiloguePipeline::ThreadCategory::Producer
                                     : EpiloguePipeline::ThreadCategory::NonParticipant;
    epilogue_params.producer_arv_count = 32;
    epilogue_params.consumer_arv_count = kConsumers;
    epilogue_params.dst_blockid = block_rank_in_cluster();
    EpiloguePipeline epilogue_pipeline(storage.epilogue_pipeline, epilogue_params);

    // The whole cluster sees the barriers, and all threads what the kernel before this one wrote.
    cluster_arrive_relaxed();
    cluster_wait();
    cutlass::arch::wait_on_dependent_grids();
    if constexpr (Scheduler::kReadsMemory) Scheduler::fill(params.scheduler, storage);

    if (consumes) {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(params, storage, pipeline, epilogue_pipeline);
    } else {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (loads) {
        if constexpr (kSplits) pipeline_params.transaction_bytes = Split::Mma::kBytes;
        Pipeline part_pipeline(storage.pipeline, pipeline_params, ClusterShape{}, false_type{}, false_type{});
        load(params, storage, pipeline, part_pipeline);
      }
      if (fetches) fetch(params, storage, epilogue_pipeline);
      if constexpr (Scheduler::kReadsMemory) {
        const int end = scheduler_of(params, storage).end();
        if (warp == 3) Epilogue::clear(params.epilogue, threadIdx.x % 32, end + blockIdx.x, gridDim.x);
      }
    }
  }

 private:
  CUTLASS_DEVICE static Scheduler scheduler_of(Params const& params, SharedStorage const& storage) {
    if constexpr (Scheduler::kReadsMemory) {
      return Scheduler(params.scheduler, storage);
    } else {
      return Scheduler(params.scheduler);
    }
  }
  // Hands an epilogue a tile, or a part of one, of so many columns: by its origin, or by all of its place.
  template <class Place, class Take>
  CUTLASS_DEVICE static void hand(Place const& at, int columns, Take take) {
    if constexpr (Scheduler::kReadsMemory) {
      take(at);
    } else {
      take(first_row(at, kTileM), at.n * columns);
    }
  }

  // Returns the number of K tiles, which is at least one for each step: what lies beyond K is read as zeros.
  CUTLASS_DEVICE static int k_tiles(Params const& params) {
    return cute::max(cute::ceil_div(cute::get<2>(params.problem), cute::get<2>(TileShape{})), int(Epilogue::kSteps));
  }
  // The i-th tile's own number, where tiles have their own, or the number of all.
  CUTLASS_DEVICE static int k_tiles(Scheduler const& scheduler, uint32_t i, int all) {
    if constexpr (Scheduler::kVariesK) {
      return cute::max(cute::ceil_div(scheduler.k_rows(i), int(cute::get<2>(TileShape{}))), 1);
    } else {
      return all;
    }
  }

  // One warp loads the operands of every part and tile.
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& storage, Pipeline& pipeline,
                                  Pipeline& part_pipeline) {
    using namespace cute;
    const Scheduler scheduler = scheduler_of(params, storage);
    Mainloop mainloop;
    const auto operands = mainloop.load_init(params.problem, params.mainloop);
    auto state = cutlass::make_producer_start_state<Pipeline>();
    int count = k_tiles(params);
    const auto one = [&](auto const& at, auto load) {
      load(coordinates(at), make_coord_iterator(shape<3>(get<0>(operands))));
      state.advance(count);
    };
    if constexpr (kSplits) {
      for (auto i = scheduler.first(); scheduler.has_part(i); i += scheduler.stride()) {
        one(scheduler.part(i), [&](auto const& at, auto k) {
          mainloop.template load<Split::kColumns>(params.mainloop, part_pipeline, state, operands, at, k, count,
                                                  threadIdx.x, block_rank_in_cluster(), storage.operands);
        });
      }
    }
    for (auto i = scheduler.first(); scheduler.has_tile(i); i += scheduler.stride()) {
      count = k_tiles(scheduler, i, count);
      one(scheduler.tile(i), [&](auto const& at, auto k) {
        mainloop.load(params.mainloop, pipeline, state, operands, at, k, count, threadIdx.x, block_rank_in_cluster(),
                      storage.operands);
      });
    }
    mainloop.load_tail(pipeline, state);
  }

  // Another fetches the operands of the epilogue.
  CUTLASS_DEVICE static void fetch(Params const& params, SharedStorage& storage, EpiloguePipeline& pipeline) {
    const Scheduler scheduler = scheduler_of(params, storage);
    auto state = cutlass::make_producer_start_state<EpiloguePipeline>();
    const auto one = [&](auto const& at, int columns) {
      pipeline.producer_acquire(state);
      hand(at, columns, [&](auto... origin) {
        Epilogue::fetch(params.epilogue, threadIdx.x % 32, origin..., storage.epilogue.stage[state.index()]);
      });
      pipeline.producer_commit(state);
      ++state;
    };
    if constexpr (kSplits) {
      for (auto i = scheduler.first(); scheduler.has_part(i); i += scheduler.stride()) {
        one(scheduler.part(i), Split::kColumns);  // fetches more columns than the part has
      }
    }
    if constexpr (Scheduler::kReadsMemory) {
      auto i = scheduler.first();
      bool there = scheduler.has_tile(i);
      auto at = scheduler.tile(there ? i : 0);
      while (there) {
        i += scheduler.stride();
        const bool more = scheduler.has_tile(i);
        const auto next = scheduler.tile(more ? i : 0);
        pipeline.producer_acquire(state);
        if (threadIdx.x % 32 == 0) {
          storage.at[state.index()] = at;
          storage.next_rows[state.index()] = more ? next.rows() : 0;
        }
        Epilogue::fetch(params.epilogue, threadIdx.x % 32, at, storage.epilogue.stage[state.index()]);
        pipeline.producer_commit(state);
        ++state;
        there = more;
        at = next;
      }
    } else {
      for (auto i = scheduler.first(); scheduler.has_tile(i); i += scheduler.stride()) one(scheduler.tile(i), kTileN);
    }
    pipeline.producer_tail(state);
  }

  // Two warpgroups multiply tiles and visit them.
  CUTLASS_DEVICE static void consume(Params const& params, SharedStorage& storage, Pipeline& pipeline,
                                     EpiloguePipeline& epilogue_pipeline) {
    using namespace cute;
    const Scheduler scheduler = scheduler_of(params, storage);
    const int thread = threadIdx.x - 128;
    const int row = thread / 32 * 16 + thread % 32 / 4;  // of the fragment, in the tile
    const int count = k_tiles(params);
    PipelineState state;
    cutlass::PipelineState<EpilogueStages::kCount> epilogue_state;

    // Where a tile lies is found while its last mma runs.
    if constexpr (kSplits) {
      for (auto i = scheduler.first(); scheduler.has_part(i); i += scheduler.stride()) {
        auto accumulators = Split::Mma::accumulators();
        NoSteps before;
        PipelineState done =
            multiply<typename Split::Mma>(storage, pipeline, state, accumulators, count, thread, before);
        const auto at = scheduler.part(i);
        typename Split::Epilogue epilogue(params.epilogue);
        begin_tile(epilogue, at, Split::kColumns, row, accumulators, storage, pipeline, done, epilogue_pipeline,
                   epilogue_state);
        visit_all(epilogue);
      }
    }

    Epilogue epilogue(params.epilogue);
    auto accumulators = Mma::accumulators();
    if constexpr (Scheduler::kReadsMemory) {
      consume_handed(scheduler, storage, pipeline, state, epilogue_pipeline, epilogue_state, accumulators, epilogue,
                     count, thread, row);
    } else {
      for (auto i = scheduler.first(); scheduler.has_tile(i); i += scheduler.stride()) {
        PipelineState done = multiply<Mma>(storage, pipeline, state, accumulators, count, thread, epilogue);
        const auto at = scheduler.tile(i);
        begin_tile(epilogue, at, kTileN, row, accumulators, storage, pipeline, done, epilogue_pipeline, epilogue_state);
      }
    }
    cutlass::arch::launch_dependent_grids();
    visit_all(epilogue);
  }

  // Consumes tiles whose places are handed over. A warpgroup multiplies none that it has no rows of, of which each has
  // half: it lets its K tiles pass.
  template <class EpilogueState, class Accumulators>
  CUTLASS_DEVICE static void consume_handed(Scheduler const& scheduler, SharedStorage& storage, Pipeline& pipeline,
                                            PipelineState& state, EpiloguePipeline& epilogue_pipeline,
                                            EpilogueState& epilogue_state, Accumulators& accumulators,
                                            Epilogue& epilogue, int all, int thread, int row) {
    const int first = __shfl_sync(0xffffffffu, thread / 128, 0) * (kTileM / 2);
    auto i = scheduler.first();
    bool multiplies = scheduler.has_tile(i) && scheduler.tile(i).rows() > first;
    for (; scheduler.has_tile(i); i += scheduler.stride()) {
      const int index = epilogue_state.index(), count = k_tiles(scheduler, i, all);
      if (multiplies) {
        PipelineState done = state;
        if constexpr (Scheduler::kVariesK) {
          done = multiply_few_or_many(storage, pipeline, state, accumulators, count, thread, epilogue,
                                      scheduler.k_rows(i));
        } else {
          done = multiply<Mma>(storage, pipeline, state, accumulators, count, thread, epilogue);
        }
        epilogue_pipeline.consumer_wait(epilogue_state);
        multiplies = storage.next_rows[index] > first;
        begin_tile(epilogue, storage.at[index], kTileN, row, accumulators, storage, pipeline, done, epilogue_pipeline,
                   epilogue_state);
      } else {
        visit_all(epilogue);
        epilogue.forget();
        // One thread gives a stage back for all warps of its warpgroup. mma keeps them together, and nothing does here:
        // a warp that is late by all stages would wait for a phase that is over, for ever.
        CUTLASS_PRAGMA_NO_UNROLL
        for (int k = 0; k < count; ++k, ++state) {
          pipeline.consumer_wait(state);
          cutlass::arch::NamedBarrier::sync(128, first != 0);
          pipeline.consumer_release(state);
        }
        epilogue_pipeline.consumer_wait(epilogue_state);
        multiplies = storage.next_rows[index] > first;
        epilogue_pipeline.consumer_release(epilogue_state);
        ++epilogue_state;
      }
    }
  }

  // The first operands of the epilogue are read under the last mma, whose stage is `done`.
  template <class E, class Place, class Accumulators>
  CUTLASS_DEVICE static void begin_tile(E& epilogue, Place const& at, int columns, int row, Accumulators& accumulators,
                                        SharedStorage& storage, Pipeline& pipeline, PipelineState& done,
                                        EpiloguePipeline& epilogue_pipeline,
                                        cutlass::PipelineState<EpilogueStages::kCount>& epilogue_state) {
    using namespace cute;
    epilogue_pipeline.consumer_wait(epilogue_state);
    AccumulatorScales<typename Epilogue::Operands> scales(storage.epilogue.stage[epilogue_state.index()], row);
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
    hand(at, columns, [&](auto... origin) { epilogue.begin(origin..., accumulators(_, _0{}, _0{}), scales); });
    epilogue_pipeline.consumer_release(epilogue_state);
    ++epilogue_state;
  }

  // Multiplies one tile, with the steps of the tile before it. The last mma still runs when this returns the state of
  // its stage.
  template <class TileMma, class Accumulators, class Before>
  CUTLASS_DEVICE static PipelineState multiply(SharedStorage& storage, Pipeline& pipeline, PipelineState& state,
                                               Accumulators& accumulators, int count, int thread, Before& before,
                                               int k_rows = 0) {
    constexpr int kSteps = Before::kSteps;
    const auto operands = TileMma::operands(storage.operands, thread);
    typename TileMma::Registers registers;
    if constexpr (Scheduler::kVariesK) registers.rows = k_rows;
    PipelineState done = state;
    multiply_and_visit<TileMma, 0>(operands, pipeline, state, done, registers, accumulators, before);
    int k = kSteps;
    CUTLASS_PRAGMA_NO_UNROLL
    for (; k + 1 < count; k += 2) {
      TileMma::template k_tile<kSteps>(operands, pipeline, state, done, registers, accumulators, before);
      TileMma::template k_tile<kSteps + 1>(operands, pipeline, state, done, registers, accumulators, before);
    }
    if (k < count) TileMma::template k_tile<kSteps>(operands, pipeline, state, done, registers, accumulators, before);
    return done;
  }

  // A tile of fewer K tiles than steps comes behind all of them.
  template <class Accumulators>
  CUTLASS_DEVICE static PipelineState multiply_few_or_many(SharedStorage& storage, Pipeline& pipeline,
                                                           PipelineState& state, Accumulators& accumulators, int count,
                                                           int thread, Epilogue& before, int k_rows) {
    if (count >= Epilogue::kSteps)
      return multiply<Mma>(storage, pipeline, state, accumulators, count, thread, before, k_rows);
    visit_all(before);
    NoSteps none;
    return multiply<Mma>(storage, pipeline, state, accumulators, count, thread, none, k_rows);
  }

  template <class TileMma, int kStep, class Operands, class Accumulators, class Before>
  CUTLASS_DEVICE static void multiply_and_visit(Operands const& operands, Pipeline& pipeline, PipelineState& state,
                                                PipelineState& done, typename TileMma::Registers& registers,
                                                Accumulators& accumulators, Before& before) {
    if constexpr (kStep < Before::kSteps) {
      TileMma::template k_tile<kStep>(operands, pipeline, state, done, registers, accumulators, before);
      multiply_and_visit<TileMma, kStep + 1>(operands, pipeline, state, done, registers, accumulators, before);
    }
  }
};

}  // namespace sparse24::cuda
