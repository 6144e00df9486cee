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
void compress(const CompressArgs&, cudaStream_t) { refuse("sparse24.compress"); }
void compress_like(const CompressLikeArgs&, cudaStream_t) { refuse("sparse24.compress_like"); }
void decompress(const DecompressArgs&, cudaStream_t) { refuse("sparse24.decompress"); }
void densest_features(const DensestFeaturesArgs&, cudaStream_t) { refuse("sparse24.densest_features"); }
void feature_counts(const FeatureCountsArgs&, cudaStream_t) { refuse("sparse24.feature_counts"); }
void gather_features(const GatherFeaturesArgs&, cudaStream_t) { refuse("sparse24.gather_features"); }
void put_features(const PutFeaturesArgs&, cudaStream_t) { refuse("sparse24.put_features"); }
void quantize_fp8(const QuantizeArgs&, cudaStream_t) { refuse("sparse24.quantize_fp8"); }
void usable_scales(const UsableScalesArgs&, cudaStream_t) { refuse("sparse24.quantize_fp8"); }
MmPlan plan_mm(const MmArgs&) { refuse("sparse24.mm"); }
void mm(const MmArgs&, const MmPlan&, cudaStream_t) { refuse("sparse24.mm"); }
void linear_relu2(const LinearRelu2Args&, cudaStream_t) { refuse("sparse24.linear_relu2"); }
void linear_compress(const LinearCompressArgs&, cudaStream_t) { refuse("sparse24.linear_compress"); }
void linear_gradient(const LinearGradientArgs&, cudaStream_t) { refuse("sparse24.linear_gradient"); }
void linear_relu2_gradient(const LinearRelu2GradientArgs&, cudaStream_t) { refuse("sparse24.linear_relu2_gradient"); }

}  // namespace sparse24::cuda
