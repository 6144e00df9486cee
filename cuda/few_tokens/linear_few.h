// The first product for few tokens.
#pragma once

#include "few_tokens/active_lists.h"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

struct LinearLaunch {
  LinearFewArgs args;  // whose y is not written
  ActiveLists lists;   // which are
};

void linear_few(const LinearLaunch& launch, cudaStream_t stream);

}  // namespace sparse24::cuda
