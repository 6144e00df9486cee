// Launches of dense products of few tokens: how a weight is walked, tensor maps, and the choice of a kernel.
#pragma once

#include <algorithm>

#include "few_tokens/dense_few.cuh"
#include "few_tokens/launch_few.cuh"
#include "sparse24/device.h"

namespace sparse24::cuda {

// A block has more than half of the shared memory of a multiprocessor, so that two never share one while others idle.
constexpr int kLeastSharedBytes = 116 * 1024;
// Rows of a tile: those of all warpgroups of a block.
constexpr int kMaxTileRows = 192;

// The walk of a weight [rows, row_bytes]: as many tiles as run `at_a_time`, or a multiple of it.
inline DenseWalk dense_walk(int64_t rows, int64_t row_bytes, int slices, int64_t at_a_time) {
  const int64_t eights = DenseWalk::eights(rows);
  const int64_t tiles = std::min(ceil_div(rows, kMaxTileRows * at_a_time) * at_a_time, eights);
  return {int(rows), int(tiles), slices, int(ceil_div(row_bytes, 128)), int(ceil_div(eights, tiles)) * 8};
}

// The map of a matrix [rows, row_bytes], of which a copy takes 128 bytes of some rows.
inline CUtensorMap map_of_rows(const void* start, int64_t rows, int64_t row_bytes, int box_rows) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes), cuuint64_t(rows)}, strides[] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[] = {128, cuuint32_t(box_rows)}, every[] = {1, 1};
  CUtensorMap map{};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(start), sizes, strides, box,
                                 every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "sparse24: cuTensorMapEncodeTiled failed with error ", int(result));
  return map;
}

template <class Tile, class Sink>
void launch_tile(const char* name, DenseLaunch<typename Sink::Params>& launch, const void* w, const void* x,
                 int64_t row_bytes, cudaStream_t stream) {
  const DenseWalk& walk = launch.walk;
  launch.w = map_of_rows(w, walk.rows, row_bytes, walk.box_rows);
  launch.x = map_of_rows(x, launch.tokens, row_bytes, Tile::kTokens);
  const int spare = kMaxSharedBytes - Tile::shared_bytes(walk, 0);
  launch.stages = std::min(spare / Tile::stage(walk.box_rows), Tile::kMaxStages);
  static_assert(Tile::kMostSumsBytes + int(sizeof(typename Tile::Shared)) + 1024 <= kLeastSharedBytes);
  const int blocks = walk.slices > 1 ? walk.units() : std::min(walk.units(), device_info().sm_count);
  FewGrid grid{blocks, 128 * Tile::warpgroups(walk) + 32,
               std::max(Tile::shared_bytes(walk, launch.stages), kLeastSharedBytes)};
  grid.cluster = walk.slices;
  grid.dependent = true;
  launch_few<dense_few_kernel<Tile, Sink>>(name, grid, launch, stream);
}

// By the least number of columns that has all tokens, or all rows of a tile. Sink<Tile> is what is done with sums.
template <class Element, template <class> class Sink>
void launch_dense(const char* name, DenseLaunch<typename Sink<DenseTile<Element, 16>>::Params>& launch, const void* w,
                  const void* x, int64_t row_bytes, cudaStream_t stream) {
  const auto of = [&](auto tile) {
    using Tile = decltype(tile);
    launch_tile<Tile, Sink<Tile>>(name, launch, w, x, row_bytes, stream);
  };
  if (launch.tokens <= 16) return of(DenseTile<Element, 16>{});
  if (launch.tokens <= 32) return of(DenseTile<Element, 32>{});
  if (launch.tokens <= 64) return of(DenseTile<Element, 64>{});
  const int rows = launch.walk.box_rows;
  if (rows <= 48) return of(WideTile<Element, 48>{});
  if (rows <= 64) return of(WideTile<Element, 64>{});
  if (rows <= 80) return of(WideTile<Element, 80>{});
  if (rows <= 96) return of(WideTile<Element, 96>{});
  if (rows <= 128) return of(WideTile<Element, 128>{});
  if (rows <= 144) return of(WideTile<Element, 144>{});
  if (rows <= 176) return of(WideTile<Element, 176>{});
  of(WideTile<Element, kMaxTileRows>{});
}

}  // namespace sparse24::cuda
