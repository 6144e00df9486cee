/// @file
/// mm_active: a dense, mostly zero activation times a weight that is stored by neuron, for few tokens.
#pragma once

#include "sparse24/types.h"

namespace sparse24 {

/// out = y @ (w * scale_w) + bias, in which rows of w that no token uses are not read.
///
/// An entry of y that is zero adds nothing, whatever the weight is. A sum is a chain of float32 multiply-adds over the
/// neurons of a slice, in ascending order and without those whose y is zero; then eight slices in order, from zero, and
/// then the sums of eight in order. On the CPU there are 64 slices; on a GPU how many there are depends on `features`
/// and `out_features`. So a row of out depends on its row of y alone.
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
  void* workspace;  ///< on a GPU, cuda::mm_active_workspace bytes, aligned to 128 bytes; not used on the CPU
};

/// The most tokens of a call on a GPU.
inline constexpr int64_t kMaxActiveTokens = 64;
/// Slices of the neurons that the CPU sums apart.
inline constexpr int64_t kActiveSlices = 64;
/// Slices whose sums are added before those of others: the square root of their number.
inline constexpr int64_t kActiveGroup = 8;
/// Neurons of a slice; the last ones may have fewer, or none.
SPARSE24_HD constexpr int64_t active_slice(int64_t features) { return round_up(ceil_div(features, kActiveSlices), 8); }

namespace cpu {
void mm_active(const MmActiveArgs& args);
}
namespace cuda {
/// The bytes of a call's workspace.
int64_t mm_active_workspace(const MmActiveArgs& args);
void mm_active(const MmActiveArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
