// mm_active: the choice of a tile, and the launch.
#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.cuh"
#include "few_tokens/mm_active.h"

namespace sparse24::cuda {
namespace {

// For 1, 2, 4 and 8 tokens at a time: 256 columns, 128 columns, and rows of w that are not aligned.
using Tiles =
    std::tuple<ActiveTile<8, 1, true>, ActiveTile<8, 2, true>, ActiveTile<8, 4, true>, ActiveTile<8, 8, true>,
               ActiveTile<4, 1, true>, ActiveTile<4, 2, true>, ActiveTile<4, 4, true>, ActiveTile<4, 8, true>,
               ActiveTile<4, 1, false>, ActiveTile<4, 2, false>, ActiveTile<4, 4, false>, ActiveTile<4, 8, false>>;
constexpr int kTiles = int(std::tuple_size_v<Tiles>), kTokenCounts = 4;

template <class F, int... kIndices>
void visit_tile(int tile, std::integer_sequence<int, kIndices...>, F&& f) {
  ((tile == kIndices ? f(std::tuple_element_t<kIndices, Tiles>{}) : void()), ...);
}
template <class F>
void visit_tile(int tile, F&& f) {
  visit_tile(tile, std::make_integer_sequence<int, kTiles>{}, f);
}

template <class Y, class W>
void launch(int tile, bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    constexpr auto kKernel = mm_active_kernel<Y, W, Tile>;
    const int64_t tiles = ceil_div(args.out_features, Tile::kColumns) * ceil_div(args.tokens, Tile::kTokens);
    launch_few<kKernel>("mm_active", Tile::kBlocks * tiles, Tile::kThreads, sizeof(ActiveStorage<Tile>), Tile::kBlocks,
                        dependent, args, stream);
  });
}

}  // namespace

int active_tile_count() { return kTiles; }

bool active_tile_fits(int tile, const MmActiveArgs& args) {
  bool fits = false;
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    const int64_t bytes = Tile::kVec * size_of(args.w_dtype), row_bytes = args.out_features * size_of(args.w_dtype);
    const bool aligned = row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(args.w) % bytes == 0;
    fits = aligned || !Tile::kVectors;
  });
  return fits;
}

int select_active_tile(const MmActiveArgs& args) {
  const int of_tokens = args.tokens <= 1 ? 0 : args.tokens <= 2 ? 1 : args.tokens <= 4 ? 2 : 3;
  int tile = of_tokens + (args.out_features >= 4096 ? 0 : kTokenCounts);
  while (!active_tile_fits(tile, args)) tile += kTokenCounts;
  return tile;
}

void mm_active_tile(int tile, bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  check(args.tokens <= kMaxActiveTokens, "sparse24.mm_active: expected y to have at most ", kMaxActiveTokens,
        " rows on a CUDA device, got ", args.tokens);
  if (args.tokens == 0 || args.out_features == 0) return;
  dispatch_16bit(args.dtype, [&](auto type) {
    using Y = decltype(type);
    if (args.w_dtype == DType::kFloat8E4M3) {
      launch<Y, __nv_fp8_e4m3>(tile, dependent, args, stream);
    } else {
      launch<Y, Y>(tile, dependent, args, stream);
    }
  });
}

void mm_active(const MmActiveArgs& args, cudaStream_t stream) {
  mm_active_tile(select_active_tile(args), false, args, stream);
}

}  // namespace sparse24::cuda
