// Host side of mm: finds the kernel in tiles.def for the operands and launches it.
#include "gemm/mm_launchers.h"
#include "gemm/mm_splits.h"
#include "gemm/tuning.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

using Launcher = void (*)(const MmArgs&, const GemmConfig&, cudaStream_t);

struct Instance {
  DType dtype;
  Dim a_dim;
  Major b_major;
  GemmTile tile;
  Launcher launch;
};

constexpr Instance kInstances[] = {
#define SPARSE24_MM(dtype, a_dim, b_major, tile)             \
  {DType::dtype, Dim::a_dim, Major::b_major, GemmTile::tile, \
   launch_mm_sm90<DType::dtype, Dim::a_dim, Major::b_major, GemmTile::tile>},
#include "sparse24/tiles.def"
};

Launcher find(const MmArgs& args, GemmTile tile) {
  // fp8 values are K-major whichever way the groups lie (format.h).
  const Dim a_dim = args.a.m_contiguous() ? Dim::kTokens : Dim::kFeatures;
  for (const Instance& i : kInstances) {
    if (i.dtype == args.a.dtype && i.a_dim == a_dim && i.b_major == args.b_major && i.tile == tile) return i.launch;
  }
  fail("sparse24.mm: expected a compiled kernel for ", name_of(args.a.dtype), ", A ",
       a_dim == Dim::kTokens ? "MN" : "K", "-major, B ", args.b_major == Major::kRow ? "MN" : "K", "-major, got none");
}

// Parts of K are whole tiles, and their sums [split][m][n] fp32; K-major values can be cut without moving them.
bool may_split(const MmArgs& args) { return !args.a.m_contiguous() && args.d_major == Major::kRow; }

// SPARSE24_MM_CONFIG="tile,swizzle,m|n[,splits]" overrides the choice: tile is an index into mm_configs. For tuning.
GemmConfig choose_config(const MmArgs& args, bool split) {
  if (auto config = tuning_override("SPARSE24_MM_CONFIG", mm_configs(args.a.dtype))) {
    if (!split || !splits_evenly(*config, args.a.k, config->splits)) config->splits = 1;
    return *config;
  }
  return select_mm_config(args.a.dtype, args.a.m, args.n, args.a.k, device_model(), split);
}

}  // namespace

MmPlan plan_mm(const MmArgs& args, const GemmConfig& config) {
  return {config, config.splits == 1 ? 0 : config.splits * partial_sums_bytes(args)};
}

MmPlan plan_mm(const MmArgs& args) {
  if (args.a.m == 0 || args.n == 0) return {};
  return plan_mm(args, choose_config(args, may_split(args)));
}

void mm(const MmArgs& args, const MmPlan& plan, cudaStream_t stream) {
  if (args.a.m == 0 || args.n == 0) return;
  check(args.a.k > 0, "sparse24.mm: expected K to be above 0, got 0");
  check(!args.b_interleaved || (args.a.m_contiguous() && args.b_major == Major::kRow),
        "sparse24.mm: expected MN-major operands for an interleaved B, got others");
  check(!args.b_interleaved || args.a.k % 4 == 0 || args.b_tail,
        "sparse24.mm: expected a copy of the last rows of an interleaved B or K to be a multiple of 4, got K ",
        args.a.k);
  const GemmConfig& config = plan.config;
  const Launcher launch = find(args, config.tile);
  if (config.splits == 1) return launch(args, config, stream);
  check(may_split(args) && args.workspace && splits_evenly(config, args.a.k, config.splits),
        "sparse24.mm: expected K-major values, row-major D, a workspace, and K to be a multiple of ",
        config.tile_k * config.splits, " to split it, got K ", args.a.k);
  MmArgs parts = args;
  parts.d = args.workspace;
  parts.d_dtype = DType::kFloat32;
  parts.scale_a = parts.scale_b = nullptr;
  parts.bias = nullptr;
  launch(parts, config, stream);
  add_partial_sums(args, config.splits, stream);
}

void mm(const MmArgs& args, cudaStream_t stream) {
  if (args.a.m == 0 || args.n == 0) return;
  mm(args, plan_mm(args, choose_config(args, args.workspace && may_split(args))), stream);
}

}  // namespace sparse24::cuda
