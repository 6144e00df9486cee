// Host side of linear_relu2 and linear_compress: finds the kernel in tiles.def and launches it.
#include "gemm/linear_launchers.h"
#include "gemm/tuning.h"
#include "sparse24/device.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

struct Relu2Instance {
  DType dtype, pre_activation, y;
  GemmTile tile;
  void (*launch)(const LinearRelu2Args&, const GemmConfig&, cudaStream_t);
};
struct CompressInstance {
  DType dtype, pre_activation, y, meta;
  GemmTile tile;
  void (*launch)(const LinearCompressArgs&, const GemmConfig&, cudaStream_t);
};

constexpr Relu2Instance kRelu2Instances[] = {
#define SPARSE24_LINEAR_RELU2(dtype, pre_activation, y, tile)     \
  {DType::dtype, DType::pre_activation, DType::y, GemmTile::tile, \
   launch_linear_relu2_sm90<DType::dtype, DType::pre_activation, DType::y, GemmTile::tile>},
#include "sparse24/tiles.def"
};

constexpr CompressInstance kCompressInstances[] = {
#define SPARSE24_LINEAR_COMPRESS(dtype, pre_activation, y, meta, tile) \
  {DType::dtype,                                                       \
   DType::pre_activation,                                              \
   DType::y,                                                           \
   DType::meta,                                                        \
   GemmTile::tile,                                                     \
   launch_linear_compress_sm90<DType::dtype, DType::pre_activation, DType::y, DType::meta, GemmTile::tile>},
#include "sparse24/tiles.def"
};

bool matches(const LinearArgs& args, DType dtype, DType pre_activation, DType y) {
  return args.dtype == dtype && args.hidden_dtype == pre_activation && args.y_dtype == y;
}

// The instance of one combination of types and a tile.
template <class Instance, size_t kCount, class Matches, class Args>
void launch(const char* op, const Instance (&instances)[kCount], const Matches& match, const Args& args,
            const GemmConfig& config, cudaStream_t stream) {
  const LinearArgs& linear = args.linear;
  if (linear.tokens == 0 || linear.out == 0) return;
  check(linear.activation.kind != Activation::kNone, op, ": expected relu or its square, got no activation");
  check(linear.in > 0, op, ": expected K (columns of x) to be above 0, got 0");
  for (const Instance& i : instances) {
    if (i.tile == config.tile && match(i)) return i.launch(args, config, stream);
  }
  fail(op, ": expected a compiled kernel for x ", name_of(linear.dtype), ", h ", name_of(linear.hidden_dtype), ", y ",
       name_of(linear.y_dtype), ", ", to_string(config), ", got none");
}

}  // namespace

GemmConfig choose_linear_config(DType dtype, int64_t m, int64_t n, int64_t k, const LinearTiles& tiles) {
  if (auto config = tuning_override("SPARSE24_LINEAR_CONFIG", linear_configs(dtype, tiles))) {
    config->splits_last_wave = config->splits > 1;
    config->splits = 1;
    return *config;
  }
  return select_linear_config(dtype, m, n, k, device_model(), tiles);
}

void linear_relu2(const LinearRelu2Args& args, const GemmConfig& config, cudaStream_t stream) {
  const auto match = [&](const Relu2Instance& i) { return matches(args.linear, i.dtype, i.pre_activation, i.y); };
  launch("sparse24.linear_relu2", kRelu2Instances, match, args, config, stream);
}

void linear_compress(const LinearCompressArgs& args, const GemmConfig& config, cudaStream_t stream) {
  const auto match = [&](const CompressInstance& i) {
    return matches(args.linear, i.dtype, i.pre_activation, i.y) && meta_atom_k(i.meta) == meta_atom_k(args.meta_dtype);
  };
  launch("sparse24.linear_compress", kCompressInstances, match, args, config, stream);
}

void linear_relu2(const LinearRelu2Args& args, cudaStream_t stream) {
  const LinearArgs& l = args.linear;
  const LinearTiles tiles = linear_relu2_tiles(l.dtype, l.y_dtype);
  linear_relu2(args, choose_linear_config(l.dtype, l.tokens, l.out, l.in, tiles), stream);
}

void linear_compress(const LinearCompressArgs& args, cudaStream_t stream) {
  const LinearArgs& l = args.linear;
  const LinearTiles tiles = linear_compress_tiles(l.dtype, l.y_dtype, args.meta_dtype);
  linear_compress(args, choose_linear_config(l.dtype, l.tokens, l.out, l.in, tiles), stream);
}

}  // namespace sparse24::cuda
