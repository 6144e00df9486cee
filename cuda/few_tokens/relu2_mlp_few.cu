// relu2_mlp_few: in one kernel where that fits, or its two products.
#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.h"
#include "few_tokens/relu2_mlp_few.cuh"

namespace sparse24::cuda {
namespace {

template <class T, class W, class Tile>
bool try_launch(const NetworkLaunch& launch, cudaStream_t stream) {
  const int64_t bytes = Tile::shared_bytes(launch.first);
  if (bytes > kMaxSharedBytes) return false;
  constexpr auto kKernel = relu2_mlp_few_kernel<T, W, Tile>;
  FewGrid grid{2 * kActiveSlices, Tile::kThreads, int(bytes), 2};
  grid.dependent = true;  // on whatever is in front of it
  launch_few<kKernel>("relu2_mlp_few", grid, launch, stream);
  return true;
}

template <class T, class W>
bool try_tiles(const NetworkLaunch& launch, cudaStream_t stream) {
  const int64_t tokens = launch.first.tokens;
  if (tokens <= 2) {
    return try_launch<T, W, NetworkTile<W, 2, 3>>(launch, stream) ||
           try_launch<T, W, NetworkTile<W, 2, 2>>(launch, stream);
  }
  if (tokens <= 4) return try_launch<T, W, NetworkTile<W, 4, 2>>(launch, stream);
  return try_launch<T, W, NetworkTile<W, 8, 2>>(launch, stream);
}

// Whether it has run.
bool try_one_kernel(const Relu2MlpFewArgs& args, cudaStream_t stream) {
  if (args.first.tokens > kActiveTokens || args.first.w_dtype != args.second.w_dtype || !active_vectors(args.second)) {
    return false;
  }
  const NetworkLaunch launch{args.first, active_launch(args.second, 0, args.second.tokens)};
  bool ran = false;
  dispatch_16bit(args.first.dtype, [&](auto type) {
    using T = decltype(type);
    ran = args.first.w_dtype == DType::kFloat8E4M3 ? try_tiles<T, __nv_fp8_e4m3>(launch, stream)
                                                   : try_tiles<T, T>(launch, stream);
  });
  if (ran) launch_add_active_sums(launch.second, stream);
  return ran;
}

}  // namespace

void relu2_mlp_few(const Relu2MlpFewArgs& args, cudaStream_t stream) {
  if (try_one_kernel(args, stream)) return;
  linear_few(args.first, stream);
  launch_mm_active(args.first.out > 0, args.second, stream);
}

}  // namespace sparse24::cuda
