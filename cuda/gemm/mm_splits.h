// K is computed in parts, whose sums [split][m][ld] in fp32 a second kernel adds up in order.
#pragma once

#include "sparse24/mm.h"

namespace sparse24::cuda {

// Rows of sums are 16-byte aligned.
inline int64_t partial_sums_ld(const MmArgs& args) { return round_up(args.n, 4); }
// The bytes of the sums of one part.
inline int64_t partial_sums_bytes(const MmArgs& args) { return args.a.m * partial_sums_ld(args) * 4; }

// Makes D of the sums in the workspace, which a kernel on the same stream is about to write.
void add_partial_sums(const MmArgs& args, int splits, cudaStream_t stream);

}  // namespace sparse24::cuda
