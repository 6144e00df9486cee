// mm_active with a chosen tile, and as the second kernel of a network.
#pragma once

#include "sparse24/mm_active.h"

namespace sparse24::cuda {

int active_tile_count();
// Whether the tile can read the rows of w. Any takes any number of tokens: in groups.
bool active_tile_fits(int tile, const MmActiveArgs& args);
int select_active_tile(const MmActiveArgs& args);

// `dependent`: started before the kernel in front of it, which writes y, is complete.
void mm_active_tile(int tile, bool dependent, const MmActiveArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
