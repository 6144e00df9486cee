// Host side of linear_relu2_gradient: finds the kernel in tiles.def and launches it.
#include "gemm/linear_launchers.h"
#include "gemm/linear_relu2_gradient_launchers.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Instance {
  DType dtype;
  GemmTile tile;
  void (*launch)(const LinearRelu2GradientArgs&, const GemmConfig&, cudaStream_t);
};

constexpr Instance kInstances[] = {
#define SPARSE24_LINEAR_RELU2_GRADIENT(dtype, tile) \
  {DType::dtype, GemmTile::tile, launch_linear_relu2_gradient_sm90<DType::dtype, GemmTile::tile>},
#include "sparse24/tiles.def"
};

}  // namespace

void linear_relu2_gradient(const LinearRelu2GradientArgs& args, const GemmConfig& config, cudaStream_t stream) {
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
