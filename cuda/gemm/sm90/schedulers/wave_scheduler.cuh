// A scheduler (schedulers/scheduler.cuh) whose waves have one tile for each CTA, and which may split the tiles of a
// last wave that few CTAs would work in.
//
// With 4,096 tiles and 132 multiprocessors a last wave of four would cost as much as any other. So as many tiles as
// are left over by whole waves may be split: the CTAs begin with their parts, a quarter of the columns each.
//
//     CTAs 0, 1      part 0 of tiles 0, 1      tiles 4, 5      tiles 136, 137    ...
//     CTAs 2, 3      part 0 of tiles 2, 3      tiles 6, 7      tiles 138, 139    ...
//     CTAs 4, 5      part 1 of tiles 0, 1      tiles 8, 9      tiles 140, 141    ...
//       ...
//     CTAs 16, 17    tiles 20, 21              ...
//
// A cluster works on neighbouring tiles, or on the same part of them. The heuristics say where it pays.
#pragma once

#include <cutlass/cutlass.h>

#include <algorithm>
#include <cstdint>

#include "gemm/sm90/schedulers/raster_groups.cuh"
#include "gemm/sm90/schedulers/scheduler.cuh"
#include "sparse24/gemm.h"

namespace sparse24::cuda {

// kClusterSize: the tiles of a cluster, along M. kParts: of a split tile, along N.
template <int kClusterSize, int kParts_>
class WaveScheduler {
 public:
  static constexpr int kParts = kParts_;
  static constexpr bool kReadsMemory = false, kVariesK = false;
  struct Shared {};
  struct Params {
    RasterGroups raster;
    uint32_t ctas, split;  // split: tiles
  };
  struct Part {
    uint32_t tile;
    int index;
  };

  static Params params(ResultShape const& shape, GemmConfig const& config, int multiprocessors) {
    const RasterGroups raster(cutlass::ceil_div(shape.m, shape.tile_m * kClusterSize),
                              cutlass::ceil_div(shape.n, shape.tile_n), config.swizzle, config.raster_along_m);
    const uint32_t ctas = std::min(multiprocessors / kClusterSize, raster.clusters()) * kClusterSize;
    return {raster, ctas, kParts > 1 && config.splits_last_wave ? left_over(raster, ctas) : 0};
  }
  static dim3 grid(Params const& params) { return dim3(params.ctas); }

  // The i-th part of so many split tiles.
  CUTLASS_HOST_DEVICE static Part part_of(uint32_t i, uint32_t split) {
    const uint32_t cluster = i / kClusterSize, clusters = split / kClusterSize;
    return {cluster % clusters * kClusterSize + i % kClusterSize, int(cluster / clusters)};
  }

  // How many tiles whole waves of `ctas` leave over: whole clusters.
  static uint32_t left_over(RasterGroups const& raster, uint32_t ctas) { return tiles(raster) % ctas; }

  CUTLASS_DEVICE explicit WaveScheduler(Params const& params)
      : WaveScheduler(params.raster, params.split, blockIdx.x, params.ctas) {}
  // cta: of `ctas`, in the order of tiles.
  CUTLASS_HOST_DEVICE WaveScheduler(RasterGroups const& raster, uint32_t split, uint32_t cta, uint32_t ctas)
      : raster_(raster), tiles_(tiles(raster) - split), split_(split), cta_(cta), ctas_(ctas) {}

  // Both of this CTA's parts and of its whole tiles.
  CUTLASS_HOST_DEVICE uint32_t first() const { return cta_; }
  CUTLASS_HOST_DEVICE uint32_t stride() const { return ctas_; }

  CUTLASS_HOST_DEVICE bool has_part(uint32_t i) const { return i < split_ * kParts; }
  CUTLASS_HOST_DEVICE Place part(uint32_t i) const {
    const Part part = part_of(i, split_);
    const Place tile = place(part.tile);
    return {tile.m, tile.n * kParts + part.index, 0};
  }

  CUTLASS_HOST_DEVICE bool has_tile(uint32_t i) const { return i < tiles_; }
  CUTLASS_HOST_DEVICE Place tile(uint32_t i) const { return place(split_ + i); }

 private:
  CUTLASS_HOST_DEVICE static uint32_t tiles(RasterGroups const& raster) {
    return uint32_t(raster.clusters() * kClusterSize);
  }
  CUTLASS_HOST_DEVICE Place place(uint32_t number) const {
    const auto cluster = raster_.cluster(int(number / kClusterSize));
    return {cluster.m * kClusterSize + int(number % kClusterSize), cluster.n, 0};
  }

  RasterGroups const& raster_;
  uint32_t tiles_, split_, cta_, ctas_;
};

}  // namespace sparse24::cuda
