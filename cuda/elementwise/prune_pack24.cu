// The host side of prune_pack24, which picks the kernel by types and direction.
#include "common/launch.cuh"
#include "elementwise/prune_pack24.cuh"
#include "sparse24/pack.h"

namespace sparse24::cuda {
namespace {

template <class In, class Out>
void launch(const PrunePackArgs& args, cudaStream_t stream) {
  const Operand a = args.operand();
  const auto run = [&](auto kernel, int64_t blocks, int64_t inner_blocks) {
    kernel<<<unsigned(blocks), kPackThreads, 0, stream>>>(static_cast<const In*>(args.w), args.cols, a,
                                                          static_cast<Out*>(args.pruned),
                                                          static_cast<Out*>(args.values), args.meta, int(inner_blocks));
    check_launch("prune_pack24");
  };
  if (args.dim == Dim::kFeatures) {
    const int64_t columns = ceil_div(a.k_meta, kPackColumns);
    return run(prune_pack_features<In, Out>, a.m_meta / kPackRows * columns, columns);
  }
  if constexpr (sizeof(Out) == 2) {
    const int64_t features = a.m_meta / kPackFeatures;
    run(prune_pack_transposed<In, Out>, ceil_div(a.k_meta, kPackDepth) * features, features);
  } else {
    fail("sparse24.prune_pack24: expected dim to be -1 (float8_e4m3fn), got -2");
  }
}

}  // namespace

void prune_pack24(const PrunePackArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.cols == 0) return;
  const bool half = args.dtype == DType::kFloat16;
  switch (args.w_dtype) {
    case DType::kFloat32:
      return half ? launch<float, __half>(args, stream) : launch<float, __nv_bfloat16>(args, stream);
    case DType::kFloat16: return launch<__half, __half>(args, stream);
    case DType::kBFloat16: return launch<__nv_bfloat16, __nv_bfloat16>(args, stream);
    case DType::kFloat8E4M3: return launch<E4M3Code, E4M3Code>(args, stream);
  }
}

}  // namespace sparse24::cuda
