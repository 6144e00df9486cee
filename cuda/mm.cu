// Host side of mm: finds the kernel of mm_instances.def for the operands and launches it.
#include <cstdio>
#include <cstdlib>

#include "mm_launchers.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

using Launcher = void (*)(const MmArgs&, const MmConfig&, cudaStream_t);

struct Instance {
  DType dtype;
  Dim a_dim;
  Major b_major;
  MmTile tile;
  Launcher launch;
};

constexpr Instance kInstances[] = {
#define SPARSE24_MM(dtype, a_dim, b_major, tile)           \
  {DType::dtype, Dim::a_dim, Major::b_major, MmTile::tile, \
   launch_mm_sm90<DType::dtype, Dim::a_dim, Major::b_major, MmTile::tile>},
#include "mm_instances.def"
#undef SPARSE24_MM
};

Launcher find(const MmArgs& args, MmTile tile) {
  // fp8 values are K-major whichever way the groups lie (format.h).
  const Dim a_dim = args.a.m_contiguous() ? Dim::kTokens : Dim::kFeatures;
  for (const Instance& i : kInstances) {
    if (i.dtype == args.a.dtype && i.a_dim == a_dim && i.b_major == args.b_major && i.tile == tile) return i.launch;
  }
  fail("sparse24.mm: expected a compiled kernel for ", name_of(args.a.dtype), ", A ",
       a_dim == Dim::kTokens ? "MN" : "K", "-major, B ", args.b_major == Major::kRow ? "MN" : "K", "-major, got none");
}

// SPARSE24_MM_CONFIG="tile,swizzle,m|n" overrides the choice: tile is an index into mm_configs(dtype). For tuning.
MmConfig choose_config(const MmArgs& args) {
  if (const char* text = std::getenv("SPARSE24_MM_CONFIG")) {
    int tile = 0, swizzle = 1;
    char raster = 'm';
    const auto configs = mm_configs(args.a.dtype);
    check(std::sscanf(text, "%d,%d,%c", &tile, &swizzle, &raster) == 3 && tile >= 0 && tile < int(configs.size()),
          "sparse24.mm: expected SPARSE24_MM_CONFIG to be \"tile,swizzle,m|n\" with tile below ", configs.size(),
          ", got \"", text, "\"");
    MmConfig config = configs[tile];
    config.swizzle = swizzle;
    config.raster_along_m = raster == 'm';
    return config;
  }
  return select_mm_config(args.a.dtype, args.a.m, args.n, args.a.k, device_info().sm_count);
}

}  // namespace

void mm(const MmArgs& args, const MmConfig& config, cudaStream_t stream) {
  if (args.a.m == 0 || args.n == 0) return;
  check(args.a.k > 0, "sparse24.mm: expected K to be above 0, got 0");
  find(args, config.tile)(args, config, stream);
}

void mm(const MmArgs& args, cudaStream_t stream) { mm(args, choose_config(args), stream); }

}  // namespace sparse24::cuda
