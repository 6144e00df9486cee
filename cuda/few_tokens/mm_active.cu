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
    const int64_t columns = 128 / size_of(args.w_dtype);
    strips = ceil_div(args.out_features, columns);
    blocks = std::clamp<int64_t>(264 / std::max<int64_t>(strips, 1), 1, 16);
    pitch = strips * columns;
    arrivals = strips * ceil_div(args.tokens, 8);
    arrival_bytes = round_up(arrivals * int64_t{sizeof(int)}, 128);
  }
  int64_t strips, blocks, pitch, arrivals, arrival_bytes;
};

template <class Y, class W, int kEights, bool kVectors>
void launch(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  using Tile = ActiveTile<W, kEights, kVectors>;
  constexpr auto kKernel = mm_active_kernel<Y, W, Tile>;
  const Division of(args);
  auto* workspace = static_cast<char*>(args.workspace);
  const ActiveLaunch launch{args, int(of.blocks), reinterpret_cast<float*>(workspace + of.arrival_bytes), int(of.pitch),
                            reinterpret_cast<int*>(workspace)};
  const int64_t tiles = of.strips * ceil_div(args.tokens, Tile::kTokens);
  launch_few<kKernel>("mm_active", of.blocks * tiles, Tile::kThreads, Tile::kSharedBytes, dependent, launch, stream);
}

template <class Y, class W, bool kVectors>
void launch_tokens(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  if (args.tokens <= 8) return launch<Y, W, 1, kVectors>(dependent, args, stream);
  // A strip of float8 has twice the columns, and 32 tokens of them do not fit the registers.
  if (args.tokens <= 16 || sizeof(W) == 1) return launch<Y, W, 2, kVectors>(dependent, args, stream);
  if constexpr (sizeof(W) == 2) launch<Y, W, 4, kVectors>(dependent, args, stream);
}

template <class Y, class W>
void launch_types(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  const auto aligned = [](const void* p, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
  };
  if (aligned(args.y, args.features * 2) && aligned(args.w, args.out_features * int64_t{sizeof(W)})) {
    launch_tokens<Y, W, true>(dependent, args, stream);
  } else {
    launch_tokens<Y, W, false>(dependent, args, stream);
  }
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
      launch_types<Y, __nv_fp8_e4m3>(dependent, args, stream);
    } else {
      launch_types<Y, Y>(dependent, args, stream);
    }
  });
}

void mm_active(const MmActiveArgs& args, cudaStream_t stream) { launch_mm_active(false, args, stream); }

}  // namespace sparse24::cuda
