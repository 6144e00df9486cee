// relu2_mlp_few: up to eight tokens the first product leaves lists of what is active, and the second one reads no more
// than they name; with more, y and which neurons are used.
#include "few_tokens/linear_few.h"
#include "few_tokens/mm_active.h"
#include "few_tokens/mm_used.h"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {
namespace {

bool makes_lists(const MmActiveArgs& second) { return second.tokens <= kListTokens || !takes_used(second); }

}  // namespace

int64_t relu2_mlp_few_workspace(const Relu2MlpFewArgs& args) {
  return makes_lists(args.second) ? mm_active_workspace(args.second) : used_workspace(args.second);
}

void relu2_mlp_few(const Relu2MlpFewArgs& args, cudaStream_t stream) {
  if (args.second.tokens == 0 || args.second.out_features == 0) return;
  if (makes_lists(args.second)) {
    const ActiveLists lists = active_lists(args.second);
    linear_few({args.first, lists}, stream);
    multiply_listed(args.second, lists, stream);
  } else {
    const UsedNeurons neurons = used_neurons(args.second);
    linear_used(args.first, neurons, stream);
    mm_used(args.second, neurons, stream);
  }
}

}  // namespace sparse24::cuda
