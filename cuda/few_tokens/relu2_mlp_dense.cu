// relu2_mlp_dense: x is quantised where the weights are float8, and each product's weight is read while the kernel in
// front of it is still running.
#include "few_tokens/dense_products.h"

namespace sparse24::cuda {

void relu2_mlp_dense(const Relu2MlpDenseArgs& args, cudaStream_t stream) {
  if (args.of_x.q != nullptr) quantize_fp8(args.of_x, stream);
  dense_relu2(args.first, stream);
  if (args.of_y.q != nullptr) quantize_fp8(args.of_y, stream);
  dense_sum(args.second, stream);
}

}  // namespace sparse24::cuda
