// mm_active as the second product of a network.
#pragma once

#include "few_tokens/active_lists.h"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// Lists in the workspace.
ActiveLists active_lists(const MmActiveArgs& args);

// What remains of mm_active when the kernel in front of it has made the lists.
void multiply_listed(const MmActiveArgs& args, const ActiveLists& lists, cudaStream_t stream);

}  // namespace sparse24::cuda
