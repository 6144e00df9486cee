// mm_active: its workspace, and the launches.
#include <algorithm>

#include "common/dispatch.cuh"
#include "few_tokens/launch_few.cuh"
#include "few_tokens/mm_active.cuh"
#include "few_tokens/mm_active.h"
#include "sparse24/device.h"

namespace sparse24::cuda {
namespace {

constexpr int64_t kAlignment = 128;

int64_t list_groups(const MmActiveArgs& args) { return ceil_div(args.tokens, int64_t{kListTokens}); }
int64_t capacity_of(const MmActiveArgs& args) { return std::max<int64_t>(1, ceil_div(args.features, kActiveSlices)); }
// Of the workspace's parts: counts, neurons, values; then sums.
int64_t count_bytes(const MmActiveArgs& args) { return round_up(kActiveSlices * list_groups(args) * 4, kAlignment); }
int64_t neuron_bytes(const MmActiveArgs& args) {
  return round_up(kActiveSlices * list_groups(args) * capacity_of(args) * 4, kAlignment);
}
int64_t value_bytes(const MmActiveArgs& args) {
  return kActiveSlices * list_groups(args) * capacity_of(args) * int64_t{sizeof(uint4)};
}
// Whether rows of w are whole pieces of 16 bytes.
bool has_vectors(const MmActiveArgs& args) {
  return reinterpret_cast<uintptr_t>(args.w) % 16 == 0 && args.out_features * size_of(args.w_dtype) % 16 == 0;
}

template <class Y, class W, int kOfLane, bool kVectors>
void launch_columns(const ActiveLaunch& launch, cudaStream_t stream) {
  using Tile = ActiveTile<kOfLane>;
  const MmActiveArgs& args = launch.args;
  FewGrid grid{ceil_div(args.out_features, int64_t{Tile::kColumns}) * Tile::kParts * launch.lists.groups,
               Tile::kThreads, int(Tile::shared_bytes(args.tokens, sizeof(W)))};
  grid.dependent = true;
  launch_few<mm_active_kernel<Y, W, Tile, kVectors>>("mm_active", grid, launch, stream);
}

// A block has a multiprocessor for itself, so that fewer columns each are for more of these, while there are any.
template <class Y, class W>
void launch_rows(const ActiveLaunch& launch, cudaStream_t stream) {
  const MmActiveArgs& args = launch.args;
  if (!has_vectors(args)) return launch_columns<Y, W, 8, false>(launch, stream);
  const int64_t blocks = device_info().sm_count / (kActiveParts * launch.lists.groups);
  if (args.out_features <= blocks * 32 * 4) return launch_columns<Y, W, 4, true>(launch, stream);
  if (args.out_features <= blocks * 32 * 6) return launch_columns<Y, W, 6, true>(launch, stream);
  launch_columns<Y, W, 8, true>(launch, stream);
}

}  // namespace

int64_t mm_active_workspace(const MmActiveArgs& args) {
  return count_bytes(args) + neuron_bytes(args) + value_bytes(args) +
         kActiveParts * args.tokens * args.out_features * int64_t{sizeof(float)};
}

ActiveLists active_lists(const MmActiveArgs& args) {
  auto* neurons = static_cast<char*>(args.workspace) + count_bytes(args);
  return {reinterpret_cast<uint32_t*>(neurons),
          reinterpret_cast<uint4*>(neurons + neuron_bytes(args)),
          static_cast<int*>(args.workspace),
          int(args.tokens),
          int(list_groups(args)),
          int(capacity_of(args))};
}

void multiply_listed(const MmActiveArgs& args, const ActiveLists& lists, cudaStream_t stream) {
  auto* sums = static_cast<char*>(args.workspace) + count_bytes(args) + neuron_bytes(args) + value_bytes(args);
  const ActiveLaunch launch{args, lists, reinterpret_cast<float*>(sums)};
  dispatch_16bit(args.dtype, [&](auto type) {
    using Y = decltype(type);
    args.w_dtype == DType::kFloat8E4M3 ? launch_rows<Y, __nv_fp8_e4m3>(launch, stream)
                                       : launch_rows<Y, Y>(launch, stream);
  });
  const int64_t results = args.tokens * args.out_features;
  FewGrid grid{ceil_div(results, int64_t{ActiveSumTile::kThreads}), ActiveSumTile::kThreads, 0};
  grid.dependent = true;
  launch_few<add_active_sums_kernel<ActiveSumTile>>("mm_active", grid, launch, stream);
}

void mm_active(const MmActiveArgs& args, cudaStream_t stream) {
  check(args.tokens <= kMaxActiveTokens, "sparse24.mm_active: expected y to have at most ", kMaxActiveTokens,
        " rows on a CUDA device, got ", args.tokens);
  if (args.tokens == 0 || args.out_features == 0) return;
  const ActiveLists lists = active_lists(args);
  FewGrid grid{kActiveSlices * lists.groups, ActiveListTile::kThreads, 0};
  launch_few<list_active_kernel<ActiveListTile>>("mm_active", grid, ActiveLaunch{args, lists, nullptr}, stream);
  multiply_listed(args, lists, stream);
}

}  // namespace sparse24::cuda
