// The first product for few tokens: the choice of a tile, and the launch.
#include <algorithm>
#include <tuple>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/linear_few.cuh"
#include "few_tokens/linear_few.h"
#include "few_tokens/mm_active.h"
#include "sparse24/device.h"

namespace sparse24::cuda {
namespace {

// By preference.
using Tiles =
    std::tuple<LinearTile<8, 1, true>, LinearTile<16, 1, true>, LinearTile<8, 2, true>, LinearTile<16, 2, true>,
               LinearTile<8, 4, true>, LinearTile<16, 4, false>, LinearTile<32, 4, false>, LinearTile<64, 4, false>>;
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
  return args.w_dtype == DType::kFloat8E4M3 ? LinearShape<Tile, 1>::shared_bytes(args.in)
                                            : LinearShape<Tile, 2>::shared_bytes(args.in);
}

template <class T, class W>
void launch(int tile, const LinearFewArgs& args, cudaStream_t stream) {
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    // One block a multiprocessor, none without a row.
    const int64_t blocks = std::min<int64_t>(device_info().sm_count, args.out);
    constexpr auto kKernel = linear_few_kernel<T, W, Tile>;
    launch_few<kKernel>("linear_few", blocks, Tile::kThreads, int(shared_bytes<Tile>(args)), false, args, stream);
  });
}

}  // namespace

int linear_few_tile_count() { return kTiles; }

bool linear_few_tile_fits(int tile, const LinearFewArgs& args) {
  bool fits = false;
  visit_tile(tile, [&](auto shape) {
    using Tile = decltype(shape);
    fits = args.tokens <= Tile::kTokens && shared_bytes<Tile>(args) <= kMaxSharedBytes;
  });
  return fits;
}

int select_linear_few_tile(const LinearFewArgs& args) {
  // Measured on an H200. float8 wants many rows for each load of x, which its conversion does not wait for.
  const bool fp8 = args.w_dtype == DType::kFloat8E4M3;
  int tile = args.tokens > 8    ? (fp8 ? 3 : 1)
             : fp8              ? (args.in * args.out >= 20'000'000 ? 4 : 2)
             : args.out > 16384 ? 2
                                : 0;
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

void relu2_mlp_few(const Relu2MlpFewArgs& args, cudaStream_t stream) {
  LinearFewArgs first = args.first;
  const ActiveArrivals arrivals = active_arrivals(args.second);
  first.zeros = arrivals.data;
  first.zero_count = arrivals.count;
  linear_few(first, stream);
  launch_mm_active(first.out > 0, args.second, stream);
}

}  // namespace sparse24::cuda
