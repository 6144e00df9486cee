// mm_active with a chosen tile, and as the second kernel of a network.
#pragma once

#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// Tiles that are compiled: how many, and the most tokens of each.
int active_tile_count();
int active_tile_tokens(int tile);
// The tile for this many tokens.
int select_active_tile(int64_t tokens, int64_t out_features);

// `dependent`: started before the kernel in front of it, which writes y, is complete.
void mm_active_tile(int tile, bool dependent, const MmActiveArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
