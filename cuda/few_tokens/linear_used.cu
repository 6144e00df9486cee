// The first product for more than eight tokens: the choice of a tile, and the launch.
#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/linear_used.cuh"
#include "few_tokens/mm_used.h"

namespace sparse24::cuda {
namespace {

template <class W>
using Tiles = std::conditional_t<sizeof(W) == 2,
                                 std::tuple<LinearTile<2, 128, 4, false, true>, LinearTile<4, 128, 4, false, true>,
                                            LinearTile<8, 64, 4, false, true, 32>>,
                                 std::tuple<LinearTile<2, 128, 4, false, true>, LinearTile<4, 128, 3, false, true>,
                                            LinearTile<8, 64, 3, false, true, 32>>>;

template <class T, class W, int kTile = 0>
void launch(const LinearUsedLaunch& launch_of, cudaStream_t stream) {
  using Tile = std::tuple_element_t<kTile, Tiles<W>>;
  const LinearFewArgs& args = launch_of.args;
  if constexpr (kTile + 1 < int(std::tuple_size_v<Tiles<W>>)) {
    if (args.tokens > Tile::kTokens) return launch<T, W, kTile + 1>(launch_of, stream);
  }
  using Shape = LinearShape<Tile, int(sizeof(W))>;
  static_assert(Shape::kRing);
  const int64_t bytes = Shape::shared_bytes(args.in, args.tokens);
  FewGrid grid{kUsedBlocks, Tile::kThreads, int(bytes)};
  grid.dependent = true;  // on whatever is in front of it
  launch_few<linear_used_kernel<T, W, Tile>>("linear_used", grid, launch_of, stream);
}

}  // namespace

void linear_used(const LinearFewArgs& args, const UsedNeurons& neurons, cudaStream_t stream) {
  const LinearUsedLaunch launch_of{args, neurons};
  dispatch_16bit(args.dtype, [&](auto type) {
    using T = decltype(type);
    args.w_dtype == DType::kFloat8E4M3 ? launch<T, __nv_fp8_e4m3>(launch_of, stream) : launch<T, T>(launch_of, stream);
  });
}

}  // namespace sparse24::cuda
