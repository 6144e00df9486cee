// relu2_mlp_few: the first product leaves lists of what is active, the second one reads no more than they name.
#include "few_tokens/linear_few.h"
#include "few_tokens/mm_active.h"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

void relu2_mlp_few(const Relu2MlpFewArgs& args, cudaStream_t stream) {
  if (args.second.tokens == 0 || args.second.out_features == 0) return;
  const ActiveLists lists = active_lists(args.second);
  linear_few({args.first, lists}, stream);
  multiply_listed(args.second, lists, stream);
}

}  // namespace sparse24::cuda
