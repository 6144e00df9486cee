// The order of launches of which one may start before the one in front of it is complete: the PTX behind it.
#pragma once

namespace sparse24::cuda {

// The kernel behind this one may start; it waits for the results.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// The kernels before this one are complete, if it was launched as dependent on them.
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace sparse24::cuda
