// Host side of linear_gradient: finds the kernel in tiles.def and launches it.
#include "elementwise/hot_slots.h"
#include "gemm/linear_gradient_launchers.h"
#include "gemm/tuning.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Instance {
  DType dtype, meta;
  bool counts;
  void (*launch)(const LinearGradientArgs&, const GemmConfig&, cudaStream_t);
};

constexpr Instance kInstances[] = {
#define SPARSE24_LINEAR_GRADIENT(dtype, meta, counts) \
  {DType::dtype, DType::meta, counts, launch_linear_gradient_sm90<DType::dtype, DType::meta, counts>},
#include "sparse24/tiles.def"
};

}  // namespace

void linear_gradient(const LinearGradientArgs& args, const GemmConfig& config, cudaStream_t stream) {
  if (args.tokens == 0 || args.features == 0) return;
  check(args.in > 0, "sparse24.linear_gradient: expected K (columns of grad) to be above 0, got 0");
  check(config.tile == kLinearGradientTile, "sparse24.linear_gradient: expected a tile of 128x192, got ",
        to_string(config));
  check(!args.roots || args.dtype == DType::kFloat16, "sparse24.linear_gradient: expected roots in float16, got ",
        name_of(args.dtype));
  if (args.hot_count > 0) hot_slots(args, stream);
  for (const Instance& i : kInstances) {
    if (i.dtype == args.dtype && i.dtype == args.hidden_dtype && i.meta == args.meta_dtype &&
        i.counts == (args.counts != nullptr))
      return i.launch(args, config, stream);
  }
  fail("sparse24.linear_gradient: expected a compiled kernel for grad ", name_of(args.dtype), ", dy ",
       name_of(args.hidden_dtype), ", metadata ", name_of(args.meta_dtype), ", got none");
}

void linear_gradient(const LinearGradientArgs& args, cudaStream_t stream) {
  GemmConfig config = select_linear_gradient_config(args.dtype, args.tokens, args.features, device_model());
  // Its order: other kernels that read the variable have two tiles or more.
  if (const auto wanted = tuning_override("SPARSE24_LINEAR_CONFIG", {config, config})) {
    config.swizzle = wanted->swizzle;
    config.raster_along_m = wanted->raster_along_m;
  }
  linear_gradient(args, config, stream);
}

}  // namespace sparse24::cuda
