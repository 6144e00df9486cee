// The first product for few tokens: the choice of a tile, and the launch.
#include <algorithm>
#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/linear_few.cuh"
#include "few_tokens/linear_few.h"
#include "sparse24/device.h"

namespace sparse24::cuda {
namespace {

// By preference: while x is small, two blocks of a multiprocessor, one of which reads while the other ends a pass.
using Tiles =
    std::tuple<LinearTile<8, 1, 256, 3, true>, LinearTile<8, 1, 256, 2, true>, LinearTile<8, 1, 128, 4, true>,
               LinearTile<16, 1, 256, 2, true>, LinearTile<16, 1, 128, 2, true>, LinearTile<16, 2, 128, 2, true>,
               LinearTile<16, 2, 128, 4, false>, LinearTile<16, 4, 128, 4, false>, LinearTile<16, 8, 128, 2, false>>;
constexpr int kShortRows = 2;  // the tile for rows of few bytes
constexpr int kTiles = int(std::tuple_size_v<Tiles>);

template <class F, int... kIndices>
void visit_tile(int tile, std::integer_sequence<int, kIndices...>, F&& f) {
  ((tile == kIndices ? f(std::tuple_element_t<kIndices, Tiles>{}) : void()), ...);
}
template <class F>
void visit_tile(int tile, F&& f) {
  visit_tile(tile, std::make_integer_sequence<int, kTiles>{}, f);
}

template <class Tile>
int64_t shared_bytes(const LinearFewArgs& args) {
  return args.w_dtype == DType::kFloat8E4M3 ? LinearShape<Tile, 1>::shared_bytes(args.in, args.tokens)
                                            : LinearShape<Tile, 2>::shared_bytes(args.in, args.tokens);
}

template <class T, class W>
void launch(int tile, const LinearFewArgs& args, cudaStream_t stream) {
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    // None without a row.
    const int64_t blocks = std::min<int64_t>(device_info().sm_count * Tile::kBlocks, args.out);
    constexpr auto kKernel = linear_few_kernel<T, W, Tile>;
    launch_few<kKernel>("linear_few", {blocks, Tile::kThreads, int(shared_bytes<Tile>(args))}, args, stream);
  });
}

}  // namespace

int linear_few_tile_count() { return kTiles; }

bool linear_few_tile_fits(int tile, const LinearFewArgs& args) {
  bool fits = false;
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    fits =
        args.tokens <= Tile::kTokens && shared_bytes<Tile>(args) <= (Tile::kBlocks == 1 ? kMaxSharedBytes : 113 * 1024);
  });
  return fits;
}

int select_linear_few_tile(const LinearFewArgs& args) {
  int tile = args.in * size_of(args.w_dtype) <= 4096 ? kShortRows : 0;
  while (tile < kTiles - 1 && !linear_few_tile_fits(tile, args)) ++tile;
  return tile;
}

void linear_few_tile(int tile, const LinearFewArgs& args, cudaStream_t stream) {
  if (args.tokens == 0 || args.out == 0) return;
  dispatch_16bit(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.w_dtype == DType::kFloat8E4M3) {
      launch<T, __nv_fp8_e4m3>(tile, args, stream);
    } else {
      launch<T, T>(tile, args, stream);
    }
  });
}

void linear_few(const LinearFewArgs& args, cudaStream_t stream) {
  linear_few_tile(select_linear_few_tile(args), args, stream);
}

}  // namespace sparse24::cuda
