// CUTLASS's persistent scheduler, as kernels ask for one (schedulers/scheduler.cuh): it knows batches, and pads the
// order of tiles to groups of powers of two; tiles beyond the result read zeros and store nothing.
#pragma once

#include <cutlass/cutlass.h>

#include <cutlass/gemm/kernel/sm90_tile_scheduler.hpp>

#include "gemm/sm90/schedulers/scheduler.cuh"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

// The tiles of a cluster, along M and N.
template <int kClusterM, int kClusterN>
class CutlassScheduler {
  using Base = cutlass::gemm::kernel::detail::PersistentTileSchedulerSm90;
  using Raster = cutlass::gemm::kernel::detail::RasterOrder;

 public:
  static constexpr int kParts = 1;
  static constexpr bool kReadsMemory = false, kVariesK = false;
  struct Shared {};
  struct Params {
    Base::Params order;
    dim3 grid;
  };

  static Params params(ResultShape const& shape, GemmConfig const& config, int multiprocessors) {
    using Options = cutlass::gemm::kernel::detail::RasterOrderOptions;
    const auto raster = config.raster_along_m ? Options::AlongM : Options::AlongN;
    const cutlass::gemm::GemmCoord cluster(kClusterM, kClusterN, 1);
    const cutlass::KernelHardwareInfo device{0, multiprocessors};
    const dim3 tiles(cutlass::round_up(cutlass::ceil_div(shape.m, shape.tile_m), kClusterM),
                     cutlass::round_up(cutlass::ceil_div(shape.n, shape.tile_n), kClusterN), shape.batches);
    Params out;
    out.order.initialize(tiles, cluster, device, config.swizzle, raster);
    out.grid = Base::Params::get_grid_shape(tiles, cluster, device, config.swizzle, raster);
    return out;
  }
  static dim3 grid(Params const& params) { return params.grid; }

  CUTLASS_DEVICE explicit CutlassScheduler(Params const& params)
      : order_(params.order),
        first_(params.order.raster_order_ == Raster::AlongN
                   ? uint64_t(blockIdx.x) + uint64_t(blockIdx.y) * uint64_t(gridDim.x)
                   : uint64_t(blockIdx.x) * uint64_t(gridDim.y) + uint64_t(blockIdx.y)),
        stride_(uint64_t(gridDim.x) * uint64_t(gridDim.y) * uint64_t(gridDim.z)) {}

  CUTLASS_DEVICE uint64_t first() const { return first_; }
  CUTLASS_DEVICE uint64_t stride() const { return stride_; }
  CUTLASS_DEVICE bool has_tile(uint64_t i) const { return i < order_.blocks_per_problem_; }
  CUTLASS_DEVICE Place tile(uint64_t i) const {
    uint64_t batch, in_batch;
    order_.divmod_batch_(batch, in_batch, i);
    const auto [m, n] =
        Base::get_work_idx_m_and_n(order_.divmod_cluster_shape_minor_.divide(in_batch),
                                   order_.divmod_cluster_shape_major_, order_.divmod_cluster_shape_minor_,
                                   order_.divmod_cluster_blk_major_, order_.log_swizzle_size_, order_.raster_order_);
    return {m, n, int(batch)};
  }

 private:
  Base::Params const& order_;
  uint64_t first_, stride_;
};

}  // namespace sparse24::cuda
