// The first product for few tokens: the choice of a tile, and the launch.
#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/linear_few.cuh"
#include "few_tokens/linear_few.h"

namespace sparse24::cuda {
namespace {

// By preference: with float8 weights, whose rows are short, a ring of three chunks where x leaves room for it. With
// more than eight tokens x comes through the ring, where weights have 16 bits.
template <class W>
using Tiles = std::conditional_t<
    sizeof(W) == 2,
    std::tuple<LinearTile<1, 256, 2, true>, LinearTile<1, 128, 2, true>, LinearTile<2, 128, 4, false>,
               LinearTile<4, 128, 4, false>, LinearTile<8, 128, 3, false>>,
    std::tuple<LinearTile<1, 256, 3, true>, LinearTile<1, 256, 2, true>, LinearTile<1, 128, 2, true>,
               LinearTile<2, 128, 2, true>, LinearTile<2, 128, 4, false>, LinearTile<4, 128, 4, false>,
               LinearTile<8, 128, 2, false>>>;

template <class T, class W, int kTile = 0>
void launch(const LinearLaunch& launch_of, cudaStream_t stream) {
  using Tile = std::tuple_element_t<kTile, Tiles<W>>;
  const LinearFewArgs& args = launch_of.args;
  const int64_t bytes = LinearShape<Tile, int(sizeof(W))>::shared_bytes(args.in, args.tokens);
  if constexpr (kTile + 1 < int(std::tuple_size_v<Tiles<W>>)) {
    if (args.tokens > Tile::kTokens || bytes > kMaxSharedBytes) return launch<T, W, kTile + 1>(launch_of, stream);
  }
  FewGrid grid{kActiveSlices, Tile::kThreads, int(bytes)};
  grid.dependent = true;  // on whatever is in front of it
  launch_few<linear_few_kernel<T, W, Tile>>("linear_few", grid, launch_of, stream);
}

}  // namespace

void linear_few(const LinearLaunch& of, cudaStream_t stream) {
  dispatch_16bit(of.args.dtype, [&](auto type) {
    using T = decltype(type);
    of.args.w_dtype == DType::kFloat8E4M3 ? launch<T, __nv_fp8_e4m3>(of, stream) : launch<T, T>(of, stream);
  });
}

}  // namespace sparse24::cuda
