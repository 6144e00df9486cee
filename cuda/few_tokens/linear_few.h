// The first product for few tokens with a chosen tile.
#pragma once

#include "sparse24/relu2_mlp_few.h"

namespace sparse24::cuda {

int linear_few_tile_count();
// Whether the tile takes so many tokens, and so many columns of x.
bool linear_few_tile_fits(int tile, const LinearFewArgs& args);
int select_linear_few_tile(const LinearFewArgs& args);
void linear_few_tile(int tile, const LinearFewArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
