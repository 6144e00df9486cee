/// @file
/// mm_active: a dense, mostly zero activation times a weight that is stored by neuron, for few tokens.
#pragma once

#include "sparse24/types.h"

namespace sparse24 {

/// out = y @ (w * scale_w) + bias, in which rows of w that no token uses are not read.
///
/// An entry of y that is zero adds nothing, whatever the weight is. Sums are float32, in an order that depends on
/// `features` alone, so a row of out depends on its row of y alone. The neurons are divided into slices: in each the
/// sum is a chain of multiply-adds in ascending order, without those whose y is zero. Neighbouring slices are added in
/// order in parts, from zero, and then the parts, in order.
struct MmActiveArgs {
  const void* y;  ///< [tokens, features], contiguous
  DType dtype;    ///< of y
  int64_t tokens, features, out_features;
  const void* w;  ///< [features, out_features], contiguous: row f is what neuron f writes
  DType w_dtype;  ///< that of y, or kFloat8E4M3
  const float* scale_w;
  bool scale_w_per_column;  ///< one for each of out_features, or one
  const void* bias;         ///< [out_features], or none
  DType bias_dtype;
  void* out;  ///< [tokens, out_features], contiguous
  DType out_dtype;
  void* workspace;  ///< on a GPU, cuda::mm_active_workspace bytes, aligned to 16 bytes; not used on the CPU
};

/// The most tokens of a call on a GPU.
inline constexpr int64_t kMaxActiveTokens = 64;
/// Slices of the neurons: on a GPU a block of the first product has one.
inline constexpr int64_t kActiveSlices = 128;
/// Slices whose sums are added before those of others: on a GPU a block of the second product has them.
inline constexpr int64_t kActivePart = 16;
/// The first neuron of a slice, which ends where the next one begins.
SPARSE24_HD constexpr int64_t active_slice(int64_t features, int64_t slice) { return features * slice / kActiveSlices; }

namespace cpu {
void mm_active(const MmActiveArgs& args);
}
namespace cuda {
/// The bytes of a call's workspace.
int64_t mm_active_workspace(const MmActiveArgs& args);
void mm_active(const MmActiveArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
