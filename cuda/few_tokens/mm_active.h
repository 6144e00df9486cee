// mm_active as the second kernel of a network.
#pragma once

#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// The part of the workspace in which blocks count.
struct ActiveArrivals {
  int* data;
  int count;
};
ActiveArrivals active_arrivals(const MmActiveArgs& args);

// `dependent`: started before the kernel in front of it is complete, which writes y and sets the arrivals to zero.
void launch_mm_active(bool dependent, const MmActiveArgs& args, cudaStream_t stream);

}  // namespace sparse24::cuda
