/// @file
/// The CUDA half of the waist in a build without kernels: CUDA tensors get a sentence instead of a missing symbol.
#include "sparse24/sparse24.h"

namespace sparse24::cuda {
namespace {

[[noreturn]] void refuse(const char* op) {
  fail(op, ": this build has no CUDA kernels (SPARSE24_CUDA=OFF or nvcc not found); rebuild with nvcc on the PATH");
}

}  // namespace

void check_architecture(const char* op) { refuse(op); }

// Never reached through an op, which checks the architecture first.
int64_t free_memory() { refuse("sparse24"); }
int64_t mm_active_workspace(const MmActiveArgs&) { refuse("sparse24.mm_active"); }
int64_t relu2_mlp_few_workspace(const Relu2MlpFewArgs&) { refuse("sparse24.relu2_mlp_few"); }
MmPlan plan_mm(const MmArgs&) { refuse("sparse24.mm"); }
void mm(const MmArgs&, const MmPlan&, cudaStream_t) { refuse("sparse24.mm"); }

}  // namespace sparse24::cuda
