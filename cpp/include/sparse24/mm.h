/// @file
/// mm: D = scale_a * scale_b * (A @ B) + bias, with A sparse 2:4.
#pragma once

#include <vector>

#include "sparse24/device_model.h"
#include "sparse24/format.h"
#include "sparse24/gemm.h"
#include "sparse24/token_order.h"

namespace sparse24 {

/// The sparse matrix product. Accumulates in fp32, rounds once.
///
///     D[m, n] = scale_a[m] * scale_b[n] * sum_k A[m, k] B[k, n] + bias[n]
struct MmArgs {
  Operand a;  ///< m, k > 0 and the stored form of A
  int64_t n;
  const void* values;
  const uint8_t* meta;
  const void* b;  ///< [k, n], of a.dtype
  Major b_major;  ///< kColumn (K contiguous) for fp8; on the GPU ldb and b are 16-byte aligned
  int64_t ldb;
  void* d;  ///< [m, n], contiguous
  DType d_dtype;
  Major d_major;  ///< kRow; kColumn stores D.T [n, m]

  const float* scale_a = nullptr;   ///< null: 1
  bool scale_a_per_row = false;     ///< [m], else one element
  const float* scale_b = nullptr;   ///< null: 1
  bool scale_b_per_column = false;  ///< [n], else one element
  const void* bias = nullptr;       ///< [n], null: 0
  DType bias_dtype = DType::kFloat32;

  float* workspace = nullptr;  ///< on the GPU: `MmPlan::workspace_bytes`, 16-byte aligned

  /// Column k of A multiplies row `interleaved_token(k, a.k / 4)` of b: A is of interleaved tokens, b is not. On the
  /// GPU only for a.m_contiguous() and b_major kRow.
  bool b_interleaved = false;
  /// On the GPU, for an interleaved b and a.k % 4 != 0: its rows from `first_of_tail(a.k, meta_atom_k(a.dtype))` on, in
  /// the order of the columns of A, `ldb_tail` apart and aligned as b is.
  const void* b_tail = nullptr;
  int64_t ldb_tail = 0;
};

namespace cpu {
void mm(const MmArgs& args);
}

/// Older names.
using MmTile = GemmTile;
using MmConfig = GemmConfig;

/// The configuration for one problem, a pure function; with a number of multiprocessors: of the reference device.
GemmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, const DeviceModel& device,
                            bool may_split = true);
GemmConfig select_mm_config(DType dtype, int64_t m, int64_t n, int64_t k, int sm_count, bool may_split = true);

/// The largest number of parts that K is computed in.
inline constexpr int kMostSplits = 8;

/// True if K can be computed in `splits` equal parts of whole tiles.
bool splits_evenly(const GemmConfig& config, int64_t k, int splits);

/// All configurations that are compiled for `dtype`, in the first of all orders: what `select_mm_config` chooses from.
std::vector<GemmConfig> mm_configs(DType dtype);

/// How one product runs, chosen once, and the room that it needs for that.
struct MmPlan {
  GemmConfig config{};
  int64_t workspace_bytes = 0;  ///< of `MmArgs::workspace`: zero unless K is split
};

namespace cuda {
/// For the current device and all of `args` but the workspace.
MmPlan plan_mm(const MmArgs& args);
/// With a configuration of the caller's: for tuning and for tests of every kernel.
MmPlan plan_mm(const MmArgs& args, const GemmConfig& config);
void mm(const MmArgs& args, const MmPlan& plan, cudaStream_t stream);
/// By a plan that fits the workspace of `args`: without one, K is not split.
void mm(const MmArgs& args, cudaStream_t stream);
}  // namespace cuda

}  // namespace sparse24
