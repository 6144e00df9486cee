// relu2_mlp_dense: x is quantised where the weights are float8, and each product's weight is read while the kernel in
// front of it is still running.
#include "few_tokens/dense_products.h"

namespace sparse24::cuda {
namespace {

// The counters of the second product, one for each of its tiles, and then its sums.
int64_t counters_bytes(const DenseWalk& walk) { return round_up(4 * int64_t{walk.tiles}, 256); }

}  // namespace

int64_t relu2_mlp_dense_workspace(const Relu2MlpDenseArgs& args) {
  return counters_bytes(walk_of(args.second)) + dense_sum_bytes(args.second);
}

void relu2_mlp_dense(const Relu2MlpDenseArgs& args, cudaStream_t stream) {
  const DenseWalk walk = walk_of(args.second);
  auto* counters = static_cast<unsigned*>(args.workspace);
  auto* sums = reinterpret_cast<float*>(static_cast<char*>(args.workspace) + counters_bytes(walk));
  if (args.of_x.q != nullptr) quantize_fp8(args.of_x, stream);
  dense_relu2(args.first, counters, walk.tiles, stream);
  if (args.of_y.q != nullptr) quantize_fp8(args.of_y, stream);
  dense_sum(args.second, sums, counters, stream);
}

}  // namespace sparse24::cuda
