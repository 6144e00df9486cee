/// @file
/// The words every layer shares. Nothing here needs torch, CUTLASS or a CUDA toolkit.
#pragma once

#include <cstdint>

// The CUDA runtime's own forward declaration: hosts without a toolkit can still include the waist.
struct CUstream_st;
using cudaStream_t = CUstream_st*;

#ifdef __CUDACC__
#define SPARSE24_HD __host__ __device__
#else
#define SPARSE24_HD
#endif

namespace sparse24 {

/// Element types. `kFloat8E4M3` is torch.float8_e4m3fn; `kFloat32` exists on the CPU only.
enum class DType { kFloat32, kFloat16, kBFloat16, kFloat8E4M3 };

/// Along which dimension of X [R, C] the groups of four lie; format.h draws the consequences.
enum class Dim {
  kFeatures,  ///< dim = -1: X[r, 4g .. 4g+3]; the sparse operand is X.
  kTokens,    ///< dim = -2: X[4g .. 4g+3, c]; the sparse operand is X.T.
};

/// Granularity of an fp8 scale.
enum class Scaling {
  kRow,     ///< one per row of the sparse operand A
  kTensor,  ///< one element
};

/// Which index of a matrix is contiguous in memory.
enum class Major {
  kRow,     ///< element (i, j) at i * ld + j
  kColumn,  ///< element (i, j) at j * ld + i
};

/// The largest number of float8_e4m3fn, at which conversions saturate.
inline constexpr float kLargestE4M3 = 448.0f;

SPARSE24_HD constexpr int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : t == DType::kFloat8E4M3 ? 1 : 2; }

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat8E4M3: return "float8_e4m3fn";
  }
  return "?";
}

SPARSE24_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPARSE24_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace sparse24
