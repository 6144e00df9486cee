// mm_active: the choice of a tile, and the launch.
#include "few_tokens/mm_active.h"

#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.cuh"

namespace sparse24::cuda {
namespace {

// Of 128 features, then of 256; each by the number of tokens.
using Tiles = std::tuple<ActiveTile<2, 2, 1>, ActiveTile<4, 1, 1>, ActiveTile<4, 1, 2>, ActiveTile<4, 1, 4>,
                         ActiveTile<4, 1, 8>, ActiveTile<4, 2, 1>, ActiveTile<8, 1, 1>, ActiveTile<8, 1, 2>,
                         ActiveTile<8, 1, 4>, ActiveTile<8, 1, 4, 16>>;
constexpr int kTiles = int(std::tuple_size_v<Tiles>);
constexpr int kFirstWide = 5;

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
    launch_few<kKernel>("mm_active", kActiveSlices * ceil_div(args.out_features, Tile::kFeatures), Tile::kThreads,
                        sizeof(ActiveStorage<Tile, W>), int(kActiveSlices), dependent, args, stream);
  });
}

}  // namespace

int active_tile_count() { return kTiles; }

int active_tile_tokens(int tile) {
  int tokens = 0;
  visit_tile(tile, [&](auto shape) { tokens = decltype(shape)::kMaxTokens; });
  return tokens;
}

int select_active_tile(int64_t tokens, int64_t out_features) {
  int tile = out_features >= 4096 ? kFirstWide : 0;
  while (active_tile_tokens(tile) < tokens) ++tile;
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
  mm_active_tile(select_active_tile(args.tokens, args.out_features), false, args, stream);
}

}  // namespace sparse24::cuda
