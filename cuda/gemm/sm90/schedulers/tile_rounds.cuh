// The tiles of a CTA of a persistent kernel, in rounds of one for each CTA, and none that few CTAs work in.
//
// With 4,096 tiles and 132 multiprocessors a last round of four would cost as much as any other. So as many tiles as
// are left over by whole rounds may be divided: the CTAs begin with their parts, a quarter of the columns each.
//
//     CTAs 0, 1      part 0 of tiles 0, 1      tiles 4, 5      tiles 136, 137    ...
//     CTAs 2, 3      part 0 of tiles 2, 3      tiles 6, 7      tiles 138, 139    ...
//     CTAs 4, 5      part 1 of tiles 0, 1      tiles 8, 9      tiles 140, 141    ...
//       ...
//     CTAs 16, 17    tiles 20, 21              ...
//
// A cluster works on neighbouring tiles, or on the same part of them. heuristics/cost_model.cpp says where it
// pays.
#pragma once

#include <cutlass/cutlass.h>

#include <cstdint>

#include "gemm/sm90/schedulers/tile_bands.cuh"

namespace sparse24::cuda {

// kClusterSize: tiles along M. kParts: of a divided tile, along N.
template <int kClusterSize, int kParts>
class TileRounds {
 public:
  struct Place {
    int m, n;  // of a tile; or n of a part, in parts
  };
  struct Part {
    uint32_t tile;
    int index;
  };

  // The i-th part of so many divided tiles.
  CUTLASS_HOST_DEVICE static Part part_of(uint32_t i, uint32_t divided) {
    const uint32_t cluster = i / kClusterSize, clusters = divided / kClusterSize;
    return {cluster % clusters * kClusterSize + i % kClusterSize, int(cluster / clusters)};
  }

  // How many tiles whole rounds of `ctas` leave over: whole clusters.
  static uint32_t left_over(TileBands const& bands, uint32_t ctas) { return tiles(bands) % ctas; }

  // cta: of `ctas`, in the order of tiles.
  CUTLASS_DEVICE TileRounds(TileBands const& bands, uint32_t divided, uint32_t cta, uint32_t ctas)
      : bands_(bands), tiles_(tiles(bands) - divided), divided_(divided), cta_(cta), ctas_(ctas) {}

  // This CTA's numbers of parts, then of whole tiles: each from first() on, stride() apart.
  CUTLASS_DEVICE uint32_t first() const { return cta_; }
  CUTLASS_DEVICE uint32_t stride() const { return ctas_; }
  CUTLASS_DEVICE bool has_part(uint32_t i) const { return i < divided_ * kParts; }
  CUTLASS_DEVICE bool has_tile(uint32_t i) const { return i < tiles_; }

  CUTLASS_DEVICE Place part(uint32_t i) const {
    const Part part = part_of(i, divided_);
    const Place tile = place(part.tile);
    return {tile.m, tile.n * kParts + part.index};
  }
  CUTLASS_DEVICE Place tile(uint32_t i) const { return place(divided_ + i); }

 private:
  CUTLASS_HOST_DEVICE static uint32_t tiles(TileBands const& bands) {
    return uint32_t(bands.clusters() * kClusterSize);
  }
  CUTLASS_DEVICE Place place(uint32_t number) const {
    const auto cluster = bands_.place(int(number / kClusterSize));
    return {cluster.m * kClusterSize + int(number % kClusterSize), cluster.n};
  }

  TileBands const& bands_;
  uint32_t tiles_, divided_, cta_, ctas_;
};

}  // namespace sparse24::cuda
