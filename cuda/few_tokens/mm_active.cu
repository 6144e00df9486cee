// mm_active: the choice of a tile, its workspace, and the launch.
#include <algorithm>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.cuh"
#include "few_tokens/mm_active.h"

namespace sparse24::cuda {
namespace {

// How the columns and the neurons are divided, for any number of tokens; and how the workspace is.
struct Division {
  explicit Division(const MmActiveArgs& args) {
    constexpr int64_t columns = 256, warps = 8, fewest = 32;  // ActiveTile; neurons of a warp
    strips = ceil_div(args.out_features, columns);
    blocks = 264 / std::max<int64_t>(strips, 1);  // two of a multiprocessor
    blocks = std::clamp<int64_t>(std::min(blocks, args.features / (warps * fewest)), 1, 32);
    pitch = strips * columns;
    arrivals = strips * ceil_div(args.tokens, 8);
    arrival_bytes = round_up(arrivals * int64_t{sizeof(int)}, 128);
  }
  int64_t strips, blocks, pitch, arrivals, arrival_bytes;
};

template <class Y, class W, int kTokens, bool kVectors>
void launch(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  using Tile = ActiveTile<W, kTokens, kVectors>;
  constexpr auto kKernel = mm_active_kernel<Y, W, Tile>;
  const Division of(args);
  auto* workspace = static_cast<char*>(args.workspace);
  const ActiveLaunch launch{args, int(of.blocks), reinterpret_cast<float*>(workspace + of.arrival_bytes), int(of.pitch),
                            reinterpret_cast<int*>(workspace)};
  const int64_t tiles = of.strips * ceil_div(args.tokens, Tile::kTokens);
  launch_few<kKernel>("mm_active", of.blocks * tiles, Tile::kThreads, Tile::kSharedBytes, dependent, launch, stream);
}

template <class Y, class W>
void launch_tokens(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  const bool vectors =
      reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.out_features * int64_t{sizeof(W)} % 16 == 0;
  if (!vectors) return launch<Y, W, 16, false>(dependent, args, stream);
  if (args.tokens <= 2) return launch<Y, W, 2, true>(dependent, args, stream);
  if (args.tokens <= 4) return launch<Y, W, 4, true>(dependent, args, stream);
  if (args.tokens <= 8) return launch<Y, W, 8, true>(dependent, args, stream);
  launch<Y, W, 16, true>(dependent, args, stream);
}

}  // namespace

int64_t mm_active_workspace(const MmActiveArgs& args) {
  const Division of(args);
  return of.arrival_bytes + of.blocks * args.tokens * of.pitch * int64_t{sizeof(float)};
}

ActiveArrivals active_arrivals(const MmActiveArgs& args) {
  return {static_cast<int*>(args.workspace), int(Division(args).arrivals)};
}

void launch_mm_active(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  check(args.tokens <= kMaxActiveTokens, "sparse24.mm_active: expected y to have at most ", kMaxActiveTokens,
        " rows on a CUDA device, got ", args.tokens);
  if (args.tokens == 0 || args.out_features == 0) return;
  if (!dependent) {
    const ActiveArrivals arrivals = active_arrivals(args);
    check_cuda(cudaMemsetAsync(arrivals.data, 0, arrivals.count * sizeof(int), stream), "cudaMemsetAsync");
  }
  dispatch_16bit(args.dtype, [&](auto type) {
    using Y = decltype(type);
    if (args.w_dtype == DType::kFloat8E4M3) {
      launch_tokens<Y, __nv_fp8_e4m3>(dependent, args, stream);
    } else {
      launch_tokens<Y, Y>(dependent, args, stream);
    }
  });
}

void mm_active(const MmActiveArgs& args, cudaStream_t stream) { launch_mm_active(false, args, stream); }

}  // namespace sparse24::cuda
