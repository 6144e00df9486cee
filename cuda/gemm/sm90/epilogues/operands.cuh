// The operands of an epilogue: what it multiplies with and adds, per row and per column of a tile, in shared memory
// before it is needed.
//
// If the epilogue itself read these numbers from global memory, they would cost a latency each time, of which the one
// or two warps that share a scheduler hide little. The producer's second warp fetches them instead, while the tile is
// multiplied. It uses CUTLASS's load pipeline of an epilogue, with these operands in the place of C.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/pipeline/pipeline.hpp>

namespace sparse24::cuda {

template <int kTileM, int kTileN>
struct EpilogueOperands {
  static constexpr int kM = kTileM, kN = kTileN;
  // Two neighbouring columns have acc * scale + shift.
  struct alignas(16) Columns {
    float scale[2];
    float shift[2];
  };
  // A row has acc * scale, and out_scale that its result is multiplied with.
  struct alignas(8) Row {
    float scale;
    float out_scale;
  };
  Columns columns[kTileN / 2];
  Row rows[kTileM];

  // Lets a lane of the warp that fetches bring its share: row(m) and pair(n) give the operands of row m of the tile,
  // and of its columns n and n + 1.
  template <class GetRow, class GetColumns>
  __device__ __forceinline__ void fetch(int lane, GetRow row, GetColumns pair) {
    // All loads come before the stores, or each would wait for the one before.
    Row r[(kTileM + 31) / 32];
    Columns c[(kTileN / 2 + 31) / 32];
#pragma unroll
    for (int i = 0; i < kTileM / 32; ++i) r[i] = row(32 * i + lane);
#pragma unroll
    for (int i = 0; i < kTileN / 64; ++i) c[i] = pair(2 * (32 * i + lane));
#pragma unroll
    for (int i = 0; i < kTileM / 32; ++i) rows[32 * i + lane] = r[i];
#pragma unroll
    for (int i = 0; i < kTileN / 64; ++i) columns[32 * i + lane] = c[i];
  }
};

// The operands of two tiles, of the one that is stored and of the next, which is fetched meanwhile.
template <class Operands>
struct OperandStages {
  static constexpr int kCount = 2;
  Operands stage[kCount];
};

// Makes an epilogue with operands one that CUTLASS's kernels call. It has a type `Operands`, which fetch(lane, problem,
// block_shape, block_coord, operands) fills, and operator()(problem, block_shape, block_coord, accumulators, tiled_mma,
// thread_idx, operands), which stores a tile.
template <class EpilogueOp>
class OperandsAdapter : public cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<EpilogueOp> {
  using Base = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<EpilogueOp>;

 public:
  using Base::Base;
  using TensorStorage = OperandStages<typename EpilogueOp::Operands>;
  using LoadPipeline = cutlass::PipelineTransactionAsync<TensorStorage::kCount>;
  using LoadPipelineState = cutlass::PipelineState<TensorStorage::kCount>;
  using PipelineStorage = typename LoadPipeline::SharedStorage;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return true; }

  template <class Problem, class BlockShape, class BlockCoord, class TiledMma>
  CUTLASS_DEVICE LoadPipelineState load(LoadPipeline pipeline, LoadPipelineState state, Problem problem,
                                        BlockShape block_shape, BlockCoord block_coord, TiledMma, int lane,
                                        TensorStorage& shared, int = -1) {
    pipeline.producer_acquire(state);
    this->fetch(lane, problem, block_shape, block_coord, shared.stage[state.index()]);
    pipeline.producer_commit(state);  // all lanes do, because each publishes what it wrote
    ++state;
    return state;
  }
  CUTLASS_DEVICE LoadPipelineState load_tail(LoadPipeline pipeline, LoadPipelineState state) {
    pipeline.producer_tail(state);
    return state;
  }

  template <class StorePipeline, class StorePipelineState, class Problem, class BlockShape, class BlockCoord,
            class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE auto store(LoadPipeline pipeline, LoadPipelineState state, StorePipeline, StorePipelineState stored,
                            Problem problem, BlockShape block_shape, BlockCoord block_coord,
                            cute::Tensor<Engine, Layout> accumulators, TiledMma tiled_mma, int thread_idx,
                            TensorStorage& shared, int = -1) {
    pipeline.consumer_wait(state);
    (*this)(problem, block_shape, block_coord, accumulators, tiled_mma, thread_idx, shared.stage[state.index()]);
    pipeline.consumer_release(state);
    ++state;
    return cute::make_tuple(state, stored);
  }
  template <class StorePipeline, class StorePipelineState>
  CUTLASS_DEVICE auto store_tail(LoadPipeline, LoadPipelineState state, StorePipeline, StorePipelineState stored) {
    return cute::make_tuple(state, stored);
  }
};

}  // namespace sparse24::cuda
