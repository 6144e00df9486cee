// mm_active: the choice of a tile, its workspace, and the launches.
#include <algorithm>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.cuh"
#include "few_tokens/mm_active.h"

namespace sparse24::cuda {
namespace {

int64_t pitch_of(const MmActiveArgs& args) { return round_up(args.out_features, 8); }

template <class Y, class W, int kTokens, bool kVectors>
void launch(bool dependent, const ActiveLaunch& launch, cudaStream_t stream) {
  using Tile = ActiveTile<W, kTokens, kVectors, 2>;
  constexpr auto kKernel = mm_active_kernel<Y, W, Tile>;
  const int64_t neurons = std::min<int64_t>(Tile::kNeurons, ceil_div(launch.args.features, kActiveSlices));
  FewGrid grid{2 * kActiveSlices, Tile::kThreads, Tile::kRingBytes + Tile::activation_bytes(int(neurons))};
  grid.dependent = dependent;
  launch_few<kKernel>("mm_active", grid, launch, stream);
}

template <class Y, class W>
void launch_tokens(bool dependent, const ActiveLaunch& of, cudaStream_t stream) {
  if (!active_vectors(of.args)) return launch<Y, W, 8, false>(dependent, of, stream);
  if (of.args.tokens <= 2) return launch<Y, W, 2, true>(dependent, of, stream);
  launch<Y, W, 8, true>(dependent, of, stream);
}

}  // namespace

int64_t mm_active_workspace(const MmActiveArgs& args) {
  return kActiveSlices * std::min(args.tokens, kActiveTokens) * pitch_of(args) * int64_t{sizeof(float)};
}

bool active_vectors(const MmActiveArgs& args) {
  return reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.out_features % 8 == 0;
}

ActiveLaunch active_launch(const MmActiveArgs& args, int64_t first, int64_t tokens) {
  ActiveLaunch launch{args, static_cast<float*>(args.workspace), int(pitch_of(args))};
  launch.args.tokens = tokens;
  launch.args.y = static_cast<const uint16_t*>(args.y) + first * args.features;
  launch.args.out = static_cast<char*>(args.out) + first * args.out_features * size_of(args.out_dtype);
  return launch;
}

void launch_add_active_sums(const ActiveLaunch& launch, cudaStream_t stream) {
  const int64_t strips = ceil_div(int64_t{launch.pitch}, int64_t{ActiveSumTile::kColumns});
  FewGrid grid{launch.args.tokens * strips, ActiveSumTile::kThreads, 0};
  grid.dependent = true;
  launch_few<add_active_sums_kernel<ActiveSumTile>>("mm_active", grid, launch, stream);
}

void launch_mm_active(bool dependent, const MmActiveArgs& args, cudaStream_t stream) {
  check(args.tokens <= kMaxActiveTokens, "sparse24.mm_active: expected y to have at most ", kMaxActiveTokens,
        " rows on a CUDA device, got ", args.tokens);
  if (args.out_features == 0) return;
  dispatch_16bit(args.dtype, [&](auto type) {
    using Y = decltype(type);
    for (int64_t first = 0; first < args.tokens; first += kActiveTokens) {
      const ActiveLaunch launch = active_launch(args, first, std::min(args.tokens - first, kActiveTokens));
      if (args.w_dtype == DType::kFloat8E4M3) {
        launch_tokens<Y, __nv_fp8_e4m3>(dependent && first == 0, launch, stream);
      } else {
        launch_tokens<Y, Y>(dependent && first == 0, launch, stream);
      }
      launch_add_active_sums(launch, stream);
    }
  });
}

void mm_active(const MmActiveArgs& args, cudaStream_t stream) { launch_mm_active(false, args, stream); }

}  // namespace sparse24::cuda
