// A persistent, warp-specialised GEMM for Hopper from a mainloop of CUTLASS's, or one that derives from it, an epilogue
// of ours and a scheduler (schedulers/scheduler.cuh). The mainloop's schedule says how two warpgroups of consumers
// share the work:
//
//     cooperative    a tile has rows for both:    | mma 0       | epilogue 0  | mma 1       | epilogue 1  |
//
//     pingpong       a tile each, by turns:       | mma 0       | epilogue 0  | mma 2       | epilogue 2  |
//                                                               | mma 1       | epilogue 1  | mma 3       |
//
// In pingpong one warpgroup multiplies while the other stores, so mainloops take turns. Epilogues do not, which is why
// this kernel is not CUTLASS's: there they do, because they share a staging buffer. Ours share nothing, and one that is
// longer than a mainloop runs beside that of the other warpgroup: a tile takes half of both together, not all of the
// epilogue.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/pipeline/pipeline.hpp>
#include <type_traits>

#include "gemm/sm90/schedulers/tile_walk.cuh"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

template <class Mainloop_, class Epilogue_, class Scheduler_>
class PersistentGemm {
 public:
  using Mainloop = Mainloop_;
  using Epilogue = Epilogue_;
  using Scheduler = Scheduler_;
  using TileShape = typename Mainloop::TileShape;
  using ClusterShape = typename Mainloop::DispatchPolicy::ClusterShape;
  using Problem = cute::Shape<int, int, int, int>;

 private:
  static constexpr bool kPingpong =
      std::is_base_of_v<cutlass::gemm::KernelTmaWarpSpecializedPingpong, typename Mainloop::DispatchPolicy::Schedule>;
  using TiledMma = typename Mainloop::TiledMma;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using EpiloguePipeline = typename Epilogue::LoadPipeline;
  using StorePipeline = typename Epilogue::StorePipeline;
  using Turns = cutlass::OrderedSequenceBarrier<1, 2>;
  static constexpr int kMmaThreads = cute::size(TiledMma{}), kConsumers = 256;  // for a tile; in the CTA
  static_assert(kMmaThreads == (kPingpong ? kConsumers / 2 : kConsumers), "the schedule is pingpong or cooperative");
  static_assert(Scheduler::kParts == 1, "no tile is split");
  // The accumulators of a tile decide how many registers loaders can spare.
  static constexpr int kAccumulators = cute::size<0>(TileShape{}) * cute::size<1>(TileShape{}) / kMmaThreads;
  static constexpr bool kHeavy = kAccumulators >= 208;

  struct SharedStorage {
    alignas(16) typename Mainloop::PipelineStorage pipeline;
    alignas(16) typename Epilogue::PipelineStorage epilogue_pipeline;
    alignas(16) typename Turns::SharedStorage mainloop_turns;
    alignas(16) typename Turns::SharedStorage load_turns;
    struct alignas(128) {
      typename Epilogue::TensorStorage epilogue;
      typename Mainloop::TensorStorage mainloop;
    } tensors;
  };

 public:
  static constexpr int SharedStorageSize = sizeof(SharedStorage);
  static constexpr uint32_t MaxThreadsPerBlock = 128 + kConsumers, MinBlocksPerMultiprocessor = 1;

  struct Arguments {
    Problem problem{};
    typename Mainloop::Arguments mainloop{};
    typename Epilogue::Arguments epilogue{};
    GemmConfig config{};
    int multiprocessors = 0;
  };
  struct Params {
    Problem problem{};
    typename Mainloop::Params mainloop{};
    typename Epilogue::Params epilogue{};
    typename Scheduler::Params scheduler{};
  };

  static Params params(Arguments const& args) {
    const auto [m, n, k, batches] = args.problem;
    const ResultShape shape{m, n, batches, cute::size<0>(TileShape{}), cute::size<1>(TileShape{})};
    return {args.problem, Mainloop::to_underlying_arguments(args.problem, args.mainloop, nullptr),
            Epilogue::to_underlying_arguments(args.problem, args.epilogue, nullptr),
            Scheduler::params(shape, args.config, args.multiprocessors)};
  }
  static dim3 grid(Params const& params) { return Scheduler::grid(params.scheduler); }

  CUTLASS_DEVICE void operator()(Params const& params, char* shared) const {
    using namespace cute;
    SharedStorage& storage = *reinterpret_cast<SharedStorage*>(shared);
    const int lane = cutlass::canonical_lane_idx();
    const int warp = cutlass::canonical_warp_idx_sync();
    const int thread = threadIdx.x % 128;
    const int group = cutlass::canonical_warp_group_idx();  // 0: loads; 1, 2: consume
    const bool loads = group == 0 && warp % 4 == 0, fetches = group == 0 && warp % 4 == 2;
    const int elected = elect_one_sync();
    const uint32_t rank = block_rank_in_cluster();

    if (warp == 0 && elected) Mainloop::prefetch_tma_descriptors(params.mainloop);

    typename Pipeline::Params pipeline_params;
    if (loads) pipeline_params.role = Pipeline::ThreadCategory::Producer;
    if (group != 0) pipeline_params.role = Pipeline::ThreadCategory::Consumer;
    pipeline_params.is_leader = thread == 0;
    pipeline_params.num_consumers = kMmaThreads;
    pipeline_params.num_producers = Mainloop::NumProducerThreadEvents;
    pipeline_params.transaction_bytes = params.mainloop.tma_transaction_bytes;
    Pipeline pipeline(storage.pipeline, pipeline_params, ClusterShape{});

    typename EpiloguePipeline::Params epilogue_params;
    if (fetches) epilogue_params.role = EpiloguePipeline::ThreadCategory::Producer;
    if (group != 0) epilogue_params.role = EpiloguePipeline::ThreadCategory::Consumer;
    epilogue_params.dst_blockid = block_rank_in_cluster();
    epilogue_params.producer_arv_count = 32;
    epilogue_params.consumer_arv_count = kMmaThreads;
    EpiloguePipeline epilogue_pipeline(storage.epilogue_pipeline, epilogue_params);

    // The two warps that load take turns at first, the warpgroups of a pingpong kernel at every tile.
    typename Turns::Params load_turns_params{uint32_t(warp % 4 == 0 ? 0 : 1), 32};
    Turns load_turns(storage.load_turns, load_turns_params);
    typename Turns::Params mainloop_turns_params{uint32_t(cutlass::canonical_warp_group_idx() - 1), 128};
    Turns mainloop_turns(storage.mainloop_turns, mainloop_turns_params);

    // The whole cluster sees the barriers.
    if constexpr (size(ClusterShape{}) > 1) {
      cluster_arrive_relaxed();
    } else {
      __syncthreads();
    }
    Mainloop mainloop;
    Epilogue epilogue(params.epilogue, storage.tensors.epilogue);
    const auto inputs = mainloop.load_init(params.problem, params.mainloop);
    const auto k_tiles = shape<3>(get<0>(inputs));
    if constexpr (Scheduler::kReadsMemory) cutlass::arch::wait_on_dependent_grids();
    const Scheduler scheduler(params.scheduler);
    TileWalk<Scheduler> tiles(scheduler);
    tiles.find();
    if constexpr (size(ClusterShape{}) > 1) cluster_wait();

    if (group == 0) {
      cutlass::arch::warpgroup_reg_dealloc<kHeavy ? 24 : 40>();
      if (loads) {
        cutlass::arch::wait_on_dependent_grids();
        auto write = cutlass::make_producer_start_state<Pipeline>();
        bool first = true;
        for (; tiles.valid(); tiles.advance()) {
          mainloop.load(params.mainloop, pipeline, write, inputs, coordinates(tiles.place()),
                        make_coord_iterator(shape<3>(get<0>(inputs))), k_tiles, lane, rank, storage.tensors.mainloop);
          write.advance(k_tiles);
          if (first) load_turns.arrive();
          first = false;
        }
        mainloop.load_tail(pipeline, write);
      } else if (fetches && epilogue.is_producer_load_needed()) {
        cutlass::arch::wait_on_dependent_grids();
        auto write = cutlass::make_producer_start_state<EpiloguePipeline>();
        bool first = true;
        for (; tiles.valid(); tiles.advance()) {
          if (first) load_turns.wait();  // the operands come first
          first = false;
          write = epilogue.load(epilogue_pipeline, write, params.problem, TileShape{}, coordinates(tiles.place()),
                                TiledMma{}, lane, storage.tensors.epilogue);
        }
        epilogue.load_tail(epilogue_pipeline, write);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<kHeavy ? 240 : 232>();
      constexpr int kStep = kPingpong ? 2 : 1;
      const int mma_thread = threadIdx.x % kMmaThreads;
      auto i = scheduler.first();
      typename Mainloop::PipelineState state;
      typename Epilogue::LoadPipelineState epilogue_state;
      if (kPingpong && group == 2) {  // begins with the second tile
        i += scheduler.stride();
        state.advance(k_tiles);
        epilogue_state.advance(1);
      }
      if (!scheduler.has_tile(i)) cutlass::arch::launch_dependent_grids();
      for (; scheduler.has_tile(i); i += scheduler.stride() * kStep) {
        TiledMma mma;
        auto accumulators = partition_fragment_C(mma, take<0, 2>(TileShape{}));
        if constexpr (kPingpong) mainloop_turns.wait();
        mainloop.mma(pipeline, state, accumulators, k_tiles, mma_thread, storage.tensors.mainloop, params.mainloop);
        if constexpr (kPingpong) mainloop_turns.arrive();
        const auto at = coordinates(scheduler.tile(i));  // found while the last mma runs
        mainloop.mma_tail(pipeline, state, k_tiles);
        state.advance(k_tiles * kStep);
        if (!scheduler.has_tile(i + scheduler.stride() * kStep)) cutlass::arch::launch_dependent_grids();
        StorePipeline unused({true});
        auto [next, stored] =
            epilogue.store(epilogue_pipeline, epilogue_state, unused, typename Epilogue::StorePipelineState{},
                           params.problem, TileShape{}, at, accumulators, mma, mma_thread, storage.tensors.epilogue);
        epilogue_state = next;
        if (kPingpong) epilogue_state.advance(1);
      }
    }
  }
};

}  // namespace sparse24::cuda
