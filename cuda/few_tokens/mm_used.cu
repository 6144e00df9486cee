// The second product for more than eight tokens: its workspace, and the launches.
#include <algorithm>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_used.cuh"
#include "few_tokens/mm_used.h"

namespace sparse24::cuda {
namespace {

constexpr int64_t kAlignment = 128;
// Steps of a part from which on it pays.
constexpr int64_t kLeastSteps = 8;

int64_t strips_of(const MmActiveArgs& args) { return ceil_div(args.out_features, int64_t{256}); }
int64_t parts_of(const MmActiveArgs& args) {
  const int64_t steps = ceil_div(args.features, int64_t{kStepNeurons});
  return std::max<int64_t>(1, std::min(kUsedBlocks / strips_of(args), ceil_div(steps, kLeastSteps)));
}
// Of the workspace's parts: used, y; then sums.
int64_t used_bytes(const MmActiveArgs& args) { return round_up(args.features, kAlignment); }
int64_t pitch_of(const MmActiveArgs& args) { return round_up(args.features, int64_t{kStepNeurons}); }
int64_t y_bytes(const MmActiveArgs& args) { return round_up(args.tokens * pitch_of(args) * 2, kAlignment); }

template <class Y, class W, int kEights = 2>
void launch(const UsedLaunch& launch_of, cudaStream_t stream) {
  const MmActiveArgs& args = launch_of.args;
  if constexpr (8 * kEights < kMaxActiveTokens) {
    if (args.tokens > 8 * kEights) return launch<Y, W, 2 * kEights>(launch_of, stream);
  }
  using Tile = UsedTile<W, kEights>;
  FewGrid grid{strips_of(args) * launch_of.parts, Tile::kThreads, Tile::kSharedBytes};
  grid.dependent = true;
  launch_few<mm_used_kernel<Y, W, kEights>>("mm_used", grid, launch_of, stream);
  const int64_t results = args.tokens * args.out_features;
  grid = {ceil_div(results, int64_t{UsedSumTile::kThreads}), UsedSumTile::kThreads, 0};
  grid.dependent = true;
  launch_few<add_used_sums_kernel<Y, W>>("mm_used", grid, launch_of, stream);
}

}  // namespace

bool takes_used(const MmActiveArgs& args) { return args.out_features * size_of(args.w_dtype) % 16 == 0; }

int64_t used_workspace(const MmActiveArgs& args) {
  return used_bytes(args) + y_bytes(args) + parts_of(args) * args.tokens * args.out_features * int64_t{sizeof(float)};
}

UsedNeurons used_neurons(const MmActiveArgs& args) {
  auto* used = static_cast<uint8_t*>(args.workspace);
  return {reinterpret_cast<uint16_t*>(used + used_bytes(args)), pitch_of(args), used};
}

void mm_used(const MmActiveArgs& args, const UsedNeurons& neurons, cudaStream_t stream) {
  auto* sums = static_cast<char*>(args.workspace) + used_bytes(args) + y_bytes(args);
  const UsedLaunch launch_of{args, neurons, reinterpret_cast<float*>(sums), int(parts_of(args))};
  dispatch_16bit(args.dtype, [&](auto type) {
    using Y = decltype(type);
    args.w_dtype == DType::kFloat8E4M3 ? launch<Y, __nv_fp8_e4m3>(launch_of, stream) : launch<Y, Y>(launch_of, stream);
  });
}

}  // namespace sparse24::cuda
