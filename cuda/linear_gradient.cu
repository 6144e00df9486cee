// Host side of linear_gradient: finds the kernel of linear_gradient_instances.def and launches it.
#include "linear_gradient_launchers.h"
#include "linear_launchers.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Instance {
  DType dtype, meta;
  void (*launch)(const LinearGradientArgs&, const LinearConfig&, cudaStream_t);
};

constexpr Instance kInstances[] = {
#define SPARSE24_LINEAR_GRADIENT(dtype, meta) \
  {DType::dtype, DType::meta, launch_linear_gradient_sm90<DType::dtype, DType::meta>},
#include "linear_gradient_instances.def"
#undef SPARSE24_LINEAR_GRADIENT
};

}  // namespace

void linear_gradient(const LinearGradientArgs& args, const LinearConfig& config, cudaStream_t stream) {
  if (args.tokens == 0 || args.features == 0) return;
  for (const Instance& i : kInstances) {
    if (i.dtype == args.dtype && i.dtype == args.hidden_dtype && i.meta == args.meta_dtype)
      return i.launch(args, config, stream);
  }
  fail("sparse24.linear_gradient: expected a compiled kernel for grad ", name_of(args.dtype), ", dy ",
       name_of(args.hidden_dtype), ", metadata ", name_of(args.meta_dtype), ", got none");
}

void linear_gradient(const LinearGradientArgs& args, cudaStream_t stream) {
  const LinearTile widest = LinearTile::k128x128;
  linear_gradient(args, choose_linear_config(args.dtype, args.tokens, args.features, args.in, widest), stream);
}

}  // namespace sparse24::cuda
