// Tensor maps that CuTe's copies do not make: rows of 16-bit elements in an order of their own.
#pragma once

#include <cutlass/cutlass.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/cuda_host_adapter.hpp>

#include "sparse24/error.h"

namespace sparse24::cuda {

// One dimension: elements apart, how many there are, and how many of them one copy takes.
struct MapDim {
  int64_t stride;  // of the first dimension: 1
  int64_t size;
  int box;
};

// The map of 16-bit elements whose copies are rows of 128 bytes in shared memory, swizzled as wgmma reads them; what
// lies outside reads as zeros. The order of the dimensions, the first innermost, is that of shared memory.
template <int kDims>
cute::TmaDescriptor map_16bit(const void* start, const MapDim (&dims)[kDims], const char* what) {
  cuuint64_t sizes[kDims], strides[kDims];
  cuuint32_t box[kDims], every[kDims];
  for (int i = 0; i < kDims; ++i) {
    sizes[i] = cuuint64_t(dims[i].size);
    strides[i] = 2 * cuuint64_t(dims[i].stride);
    box[i] = cuuint32_t(dims[i].box);
    every[i] = 1;
  }
  cute::TmaDescriptor map{};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kDims, const_cast<void*>(start), sizes, strides + 1, box, every,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, what, ": cuTensorMapEncodeTiled failed with error ", int(result));
  return map;
}

}  // namespace sparse24::cuda
