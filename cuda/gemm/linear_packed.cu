// Host side of linear_compress_packed: finds the kernel in tiles.def and launches it.
#include <algorithm>

#include "gemm/linear_packed_launchers.h"
#include "gemm/tuning.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Instance {
  DType dtype, pre_activation, y, meta;
  void (*launch)(const LinearCompressPackedArgs&, const GemmConfig&, cudaStream_t);
};

constexpr Instance kInstances[] = {
#define SPARSE24_LINEAR_COMPRESS_PACKED(dtype, pre_activation, y, meta) \
  {DType::dtype, DType::pre_activation, DType::y, DType::meta,          \
   launch_linear_compress_packed_sm90<DType::dtype, DType::pre_activation, DType::y, DType::meta>},
#include "sparse24/tiles.def"
};

// Whether the output of every kernel has the dtype of x, as linear_packed_config says: so has its metadata, where y is
// of 16 bits too. Float8 of anything else has no tile, and its launcher would launch nothing.
constexpr bool outputs_are_of_x() {
  for (const Instance& i : kInstances) {
    if (i.meta != i.dtype || (i.y == DType::kFloat8E4M3 && i.dtype != i.y)) return false;
  }
  return true;
}
static_assert(outputs_are_of_x());

}  // namespace

void linear_compress_packed(const LinearCompressPackedArgs& args, const GemmConfig& config, cudaStream_t stream) {
  constexpr const char* kOp = "sparse24.linear_compress_packed";
  const LinearArgs& linear = args.compress.linear;
  if (linear.tokens == 0 || linear.out == 0) return;
  check(linear.activation.kind != Activation::kNone, kOp, ": expected relu or its square, got no activation");
  check(linear.in > 0, kOp, ": expected K (columns of x) to be above 0, got 0");
  const auto tiles = linear_packed_configs(linear);
  check(std::any_of(tiles.begin(), tiles.end(), [&](const GemmConfig& c) { return c.tile == config.tile; }), kOp,
        ": expected a tile that is compiled for y ", name_of(linear.y_dtype), ", got ", to_string(config));
  for (const Instance& i : kInstances) {
    if (i.dtype == linear.dtype && i.pre_activation == linear.hidden_dtype && i.y == linear.y_dtype &&
        meta_atom_k(i.meta) == meta_atom_k(args.compress.meta_dtype))
      return i.launch(args, config, stream);
  }
  fail(kOp, ": expected a compiled kernel for x ", name_of(linear.dtype), ", h ", name_of(linear.hidden_dtype), ", y ",
       name_of(linear.y_dtype), ", metadata of ", name_of(args.compress.meta_dtype), ", ", to_string(config),
       ", got none");
}

void linear_compress_packed(const LinearCompressPackedArgs& args, cudaStream_t stream) {
  const LinearArgs& linear = args.compress.linear;
  GemmConfig config = linear_packed_config(args.compress);
  if (const auto wanted = tuning_override("SPARSE24_LINEAR_CONFIG", linear_packed_configs(linear))) config = *wanted;
  linear_compress_packed(args, config, stream);
}

}  // namespace sparse24::cuda
