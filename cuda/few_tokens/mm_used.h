// The two products for more than eight tokens.
#pragma once

#include "few_tokens/used_neurons.h"
#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

// Whether w has rows that it takes: whole pieces of 16 bytes.
bool takes_used(const MmActiveArgs& args);
// Bytes of the workspace of a network.
int64_t used_workspace(const MmActiveArgs& args);
// What lies between the products, in the workspace.
UsedNeurons used_neurons(const MmActiveArgs& args);

void linear_used(const LinearFewArgs& args, const UsedNeurons& neurons, cudaStream_t stream);
void mm_used(const MmActiveArgs& args, const UsedNeurons& neurons, cudaStream_t stream);

}  // namespace sparse24::cuda
