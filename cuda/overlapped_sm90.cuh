// A dense GEMM for Hopper whose epilogue runs under the next tile's products.
//
// Two warpgroups share a tile of 128 x 256, which moves the least through shared memory of all tiles: 128 bytes a cycle
// at the tensor cores' full rate, as many as there are. Its accumulators take 128 registers of each thread. Those of a
// second tile do not fit beside them, and an epilogue between two tiles leaves the tensor cores idle. So each thread
// takes the accumulators as 16-bit numbers, in 64 registers, and finishes them in steps (epilogue_steps.cuh), one
// behind the products of each of the next tile's first K tiles:
//
//     tensor cores     k 0 | k 1 | k 2 | ... | k last |        | k 0       | k 1       | k 2       | ...
//     threads                                         | take() | finish<0> | finish<1> | finish<2> | ...
//
// A step that takes longer than the other warpgroup's products leaves the tensor cores idle too: steps are short.
// Barriers, copies and the order of tiles are CUTLASS's.
#pragma once

#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cutlass/gemm/kernel/sm90_tile_scheduler.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "epilogue_steps.cuh"
#include "gemm_sm90.cuh"

namespace sparse24::cuda {

// Mainloop: a dense one for two warpgroups that CUTLASS builds, of which this takes the loads and the types.
template <class Mainloop_, class Epilogue>
class OverlappedGemm {
 public:
  using Mainloop = Mainloop_;
  using TileShape = typename Mainloop::TileShape;
  using ClusterShape = typename Mainloop::DispatchPolicy::ClusterShape;
  using Scheduler = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  using Problem = cute::Shape<int, int, int, int>;

 private:
  using TiledMma = typename Mainloop::TiledMma;
  using Pipeline = typename Mainloop::MainloopPipeline;
  using PipelineState = typename Mainloop::PipelineState;
  using Terms = TermsStages<typename Epilogue::Terms>;
  using TermsPipeline = cutlass::PipelineAsync<Terms::kCount>;
  static constexpr int kConsumers = decltype(cute::size(TiledMma{}))::value;

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
    typename Scheduler::Arguments scheduler{};
  };
  struct Params {
    Problem problem;
    typename Mainloop::Params mainloop;
    typename Epilogue::Params epilogue;
    cutlass::KernelHardwareInfo hw_info;
    typename Scheduler::Params scheduler;
    typename Scheduler::Arguments order;
  };

  static Params to_underlying_arguments(const Arguments& args, void*) {
    return {args.problem,
            Mainloop::to_underlying_arguments(args.problem, args.mainloop, nullptr),
            args.epilogue,
            args.hw_info,
            Scheduler::to_underlying_arguments(args.problem, TileShape{}, ClusterShape{}, args.hw_info, args.scheduler,
                                               nullptr),
            args.scheduler};
  }
  static dim3 get_grid_shape(const Params& p) {
    return Scheduler::get_grid_shape(p.scheduler, p.problem, TileShape{}, ClusterShape{}, p.hw_info, p.order);
  }
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

    Scheduler scheduler(params.scheduler);
    if (consumes) {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(params, storage, pipeline, terms_pipeline, scheduler);
    } else {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (loads) load(params, storage, pipeline, scheduler);
      if (fetches) fetch(params, storage, terms_pipeline, scheduler);
    }
  }

 private:
  // At least one for each step: what lies beyond K is read as zeros.
  CUTLASS_DEVICE static int k_tiles(Params const& params) {
    return cute::max(cute::ceil_div(cute::get<2>(params.problem), cute::get<2>(TileShape{})), int(Epilogue::kSteps));
  }

  // One warp: the operands of every tile.
  CUTLASS_DEVICE static void load(Params const& params, SharedStorage& storage, Pipeline& pipeline,
                                  Scheduler& scheduler) {
    using namespace cute;
    Mainloop mainloop;
    const auto operands = mainloop.load_init(params.problem, params.mainloop);
    auto state = cutlass::make_producer_start_state<Pipeline>();
    const int count = k_tiles(params);
    auto work = scheduler.initial_work_tile_info(ClusterShape{});
    while (work.is_valid()) {
      const auto all_k = make_coord_iterator(shape<3>(get<0>(operands)));
      mainloop.load(params.mainloop, pipeline, state, operands, make_coord(work.M_idx, work.N_idx, _, work.L_idx),
                    all_k, count, threadIdx.x, block_rank_in_cluster(), storage.operands);
      state.advance(count);
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
    }
    mainloop.load_tail(pipeline, state);
  }

  // Another: the epilogue's terms.
  CUTLASS_DEVICE static void fetch(Params const& params, SharedStorage& storage, TermsPipeline& pipeline,
                                   Scheduler& scheduler) {
    using namespace cute;
    auto state = cutlass::make_producer_start_state<TermsPipeline>();
    auto work = scheduler.initial_work_tile_info(ClusterShape{});
    while (work.is_valid()) {
      pipeline.producer_acquire(state);
      Epilogue::fetch(params.epilogue, threadIdx.x % 32, work.M_idx * get<0>(TileShape{}),
                      work.N_idx * get<1>(TileShape{}), storage.terms.stage[state.index()]);
      pipeline.producer_commit(state);
      ++state;
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
    }
    pipeline.producer_tail(state);
  }

  // Two warpgroups: products and epilogues.
  CUTLASS_DEVICE static void consume(Params const& params, SharedStorage& storage, Pipeline& pipeline,
                                     TermsPipeline& terms_pipeline, Scheduler& scheduler) {
    using namespace cute;
    const int thread = threadIdx.x - 128;
    const int row = thread / 32 * 16 + thread % 32 / 4;  // of the fragment, in the tile
    Epilogue epilogue(params.epilogue);
    auto accumulators = partition_fragment_C(TiledMma{}, take<0, 2>(TileShape{}));
    PipelineState state;
    cutlass::PipelineState<Terms::kCount> terms;
    auto work = scheduler.initial_work_tile_info(ClusterShape{});
    while (work.is_valid()) {
      multiply(storage, pipeline, state, accumulators, k_tiles(params), thread, epilogue);
      const int m = work.M_idx * get<0>(TileShape{}), n = work.N_idx * get<1>(TileShape{});
      scheduler.advance_to_next_work();
      work = scheduler.get_current_work();
      terms_pipeline.consumer_wait(terms);
      epilogue.take(m, n, row, accumulators(_, _0{}, _0{}), storage.terms.stage[terms.index()]);
      terms_pipeline.consumer_release(terms);
      ++terms;
    }
    cutlass::arch::launch_dependent_grids();
    finish_all(epilogue);
  }

  // One tile's products, with the steps of the tile before it.
  template <class Accumulators>
  CUTLASS_DEVICE static void multiply(SharedStorage& storage, Pipeline& pipeline, PipelineState& state,
                                      Accumulators& accumulators, int count, int thread, Epilogue& epilogue) {
    using namespace cute;
    const Tensor a = make_tensor(make_smem_ptr(storage.operands.smem_A.data()), typename Mainloop::SmemLayoutA{});
    const Tensor b = make_tensor(make_smem_ptr(storage.operands.smem_B.data()), typename Mainloop::SmemLayoutB{});
    TiledMma mma;
    // Descriptors are a warpgroup's: the same for all of its threads.
    const auto slice = mma.get_slice(__shfl_sync(0xffffffffu, thread / 128, 0) * 128);
    const Tensor of_a = slice.make_fragment_A(slice.partition_A(a));  // (MMA, M, K, stage)
    const Tensor of_b = slice.make_fragment_B(slice.partition_B(b));  // (MMA, N, K, stage)
    PipelineState done = state;
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    multiply_and_finish<0>(pipeline, state, done, mma, of_a, of_b, accumulators, epilogue);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int k = Epilogue::kSteps; k < count; ++k) {
      multiply_k_tile(pipeline, state, mma, of_a, of_b, accumulators);
      release(pipeline, done, accumulators);
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
  }

  template <int kStep, class A, class B, class Accumulators>
  CUTLASS_DEVICE static void multiply_and_finish(Pipeline& pipeline, PipelineState& state, PipelineState& done,
                                                 TiledMma& mma, A const& of_a, B const& of_b,
                                                 Accumulators& accumulators, Epilogue& epilogue) {
    if constexpr (kStep < Epilogue::kSteps) {
      multiply_k_tile(pipeline, state, mma, of_a, of_b, accumulators);
      finish_step<kStep>(epilogue);
      if constexpr (kStep > 0) release(pipeline, done, accumulators);
      multiply_and_finish<kStep + 1>(pipeline, state, done, mma, of_a, of_b, accumulators, epilogue);
    }
  }

  // Waits for a stage, and issues its products.
  template <class A, class B, class Accumulators>
  CUTLASS_DEVICE static void multiply_k_tile(Pipeline& pipeline, PipelineState& state, TiledMma& mma, A const& of_a,
                                             B const& of_b, Accumulators& accumulators) {
    using namespace cute;
    pipeline.consumer_wait(state, pipeline.consumer_try_wait(state));
    warpgroup_fence_operand(accumulators);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < size<2>(of_a); ++k) {
      cute::gemm(mma, of_a(_, _, k, state.index()), of_b(_, _, k, state.index()), accumulators);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    ++state;
  }

  // Gives back the stage before the last, when its products are complete.
  template <class Accumulators>
  CUTLASS_DEVICE static void release(Pipeline& pipeline, PipelineState& done, Accumulators& accumulators) {
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(accumulators);
    pipeline.consumer_release(done);
    ++done;
  }
};

}  // namespace sparse24::cuda
