// Host side of the products of experts: finds the kernel in tiles.def and launches it.
#include <limits>

#include "gemm/experts_launchers.h"
#include "sparse24/error.h"

namespace sparse24::cuda {
namespace {

template <class Args>
struct Instance {
  DType dtype, hidden;
  GemmTile tile;
  void (*launch)(const Args&, cudaStream_t);
  Major w_major = Major::kColumn;
};

constexpr Instance<ExpertsLinearRelu2Args> kLinearRelu2[] = {
#define SPARSE24_EXPERTS_LINEAR_RELU2(dtype, pre_activation, tile) \
  {DType::dtype, DType::pre_activation, GemmTile::tile,            \
   launch_experts_linear_relu2_sm90<DType::dtype, DType::pre_activation, GemmTile::tile>},
#include "sparse24/tiles.def"
};
constexpr Instance<ExpertsLinearCompressArgs> kLinearCompress[] = {
#define SPARSE24_EXPERTS_LINEAR_COMPRESS(dtype, pre_activation, tile) \
  {DType::dtype, DType::pre_activation, GemmTile::tile,               \
   launch_experts_linear_compress_sm90<DType::dtype, DType::pre_activation, GemmTile::tile>},
#include "sparse24/tiles.def"
};
// Of these the result has any type of 16 bits.
constexpr Instance<ExpertsLinearArgs> kLinear[] = {
#define SPARSE24_EXPERTS_LINEAR(dtype, tile) \
  {DType::dtype, DType::dtype, GemmTile::tile, launch_experts_linear_sm90<DType::dtype, GemmTile::tile>},
#include "sparse24/tiles.def"
};
constexpr Instance<ExpertsMmArgs> kMm[] = {
#define SPARSE24_EXPERTS_MM(dtype, w_major, tile)                                                                    \
  {DType::dtype, DType::dtype, GemmTile::tile, launch_experts_mm_sm90<DType::dtype, Major::w_major, GemmTile::tile>, \
   Major::w_major},
#include "sparse24/tiles.def"
};
constexpr Instance<ExpertsLinearGradientArgs> kLinearGradient[] = {
#define SPARSE24_EXPERTS_LINEAR_GRADIENT(dtype, tile) \
  {DType::dtype, DType::dtype, GemmTile::tile, launch_experts_linear_gradient_sm90<DType::dtype, GemmTile::tile>},
#include "sparse24/tiles.def"
};
constexpr Instance<ExpertsWeightGradientArgs> kWeightGradient[] = {
#define SPARSE24_EXPERTS_WEIGHT_GRADIENT(dtype, tile) \
  {DType::dtype, DType::dtype, GemmTile::tile, launch_experts_weight_gradient_sm90<DType::dtype, GemmTile::tile>},
#include "sparse24/tiles.def"
};

// The instance for these types whose tiles compute the fewest columns; of as many, the widest.
template <class Args, size_t kCount>
void launch(const char* op, const Instance<Args> (&instances)[kCount], DType dtype, DType hidden, int64_t out,
            const Args& args, cudaStream_t stream, Major w_major = Major::kColumn) {
  const Instance<Args>* best = nullptr;
  int64_t fewest = std::numeric_limits<int64_t>::max();
  for (const Instance<Args>& i : instances) {
    const int64_t columns = round_up(out, dense_tile(i.tile).n);
    if (i.dtype != dtype || i.hidden != hidden || i.w_major != w_major || columns > fewest) continue;
    best = &i;
    fewest = columns;
  }
  check(best != nullptr, op, ": expected a compiled kernel for x ", name_of(dtype), ", got none");
  best->launch(args, stream);
}

}  // namespace

void experts_linear_relu2(const ExpertsLinearRelu2Args& args, cudaStream_t stream) {
  const LinearArgs& linear = args.of.linear;
  launch("sparse24.experts_linear_relu2", kLinearRelu2, linear.dtype, linear.hidden_dtype, linear.out, args, stream);
}

void experts_linear_compress(const ExpertsLinearCompressArgs& args, cudaStream_t stream) {
  const LinearArgs& linear = args.of.linear;
  launch("sparse24.experts_linear_compress", kLinearCompress, linear.dtype, linear.hidden_dtype, linear.out, args,
         stream);
}

void experts_linear(const ExpertsLinearArgs& args, cudaStream_t stream) {
  const DType dtype = args.of.dtype;
  launch("sparse24.experts_linear", kLinear, dtype, dtype, args.of.out, args, stream);
}

void experts_mm(const ExpertsMmArgs& args, cudaStream_t stream) {
  const DType dtype = args.of.dtype;
  launch("sparse24.experts_mm", kMm, dtype, dtype, args.of.out, args, stream, args.of.w_major);
}

void experts_linear_gradient(const ExpertsLinearGradientArgs& args, cudaStream_t stream) {
  launch("sparse24.experts_linear_gradient", kLinearGradient, args.dtype, args.dtype, args.features, args, stream);
}

void experts_weight_gradient(const ExpertsWeightGradientArgs& args, cudaStream_t stream) {
  launch("sparse24.experts_weight_gradient", kWeightGradient, args.dtype, args.dtype, args.n, args, stream);
}

}  // namespace sparse24::cuda
