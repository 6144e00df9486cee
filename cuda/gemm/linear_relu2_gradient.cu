// Host side of linear_relu2_gradient: finds the kernel of gemm/linear_relu2_gradient_instances.def and launches it.
#include "gemm/linear_launchers.h"
#include "gemm/linear_relu2_gradient_launchers.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Instance {
  DType dtype;
  LinearTile tile;
  void (*launch)(const LinearRelu2GradientArgs&, const LinearConfig&, cudaStream_t);
};

constexpr Instance kInstances[] = {
#define SPARSE24_LINEAR_RELU2_GRADIENT(dtype, tile) \
  {DType::dtype, LinearTile::tile, launch_linear_relu2_gradient_sm90<DType::dtype, LinearTile::tile>},
#include "gemm/linear_relu2_gradient_instances.def"
#undef SPARSE24_LINEAR_RELU2_GRADIENT
};

}  // namespace

void linear_relu2_gradient(const LinearRelu2GradientArgs& args, const LinearConfig& config, cudaStream_t stream) {
  if (args.tokens == 0 || args.features == 0) return;
  check(!args.roots || args.dtype == DType::kFloat16, "sparse24.linear_relu2_gradient: expected roots in float16, got ",
        name_of(args.dtype));
  check(args.in > 0, "sparse24.linear_relu2_gradient: expected K (columns of grad) to be above 0, got 0");
  for (const Instance& i : kInstances) {
    if (i.dtype == args.dtype && i.dtype == args.hidden_dtype && i.tile == config.tile)
      return i.launch(args, config, stream);
  }
  fail("sparse24.linear_relu2_gradient: expected a compiled kernel for grad ", name_of(args.dtype), ", dy ",
       name_of(args.hidden_dtype), ", ", to_string(config), ", got none");
}

void linear_relu2_gradient(const LinearRelu2GradientArgs& args, cudaStream_t stream) {
  const LinearTiles tiles = linear_relu2_gradient_tiles();
  linear_relu2_gradient(args, choose_linear_config(args.dtype, args.tokens, args.features, args.in, tiles), stream);
}

}  // namespace sparse24::cuda
