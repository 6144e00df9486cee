// Tensor maps that CuTe's copies do not make: rows of elements in an order of their own.
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

// The rows of B: in an order of Rows' or as they are, and a copy of the last ones where that order needs it, `ld_tail`
// elements apart.
struct RowsOfB {
  bool reordered = false;
  const void* tail = nullptr;
  int64_t ld_tail = 0;
};

#ifdef __CUDACC__  // CUTLASS has the driver's call for nvcc alone; host tests look at the dimensions
// The map of elements of 8 or 16 bits whose copies are rows of 128 bytes in shared memory, swizzled as wgmma reads
// them; what lies outside reads as zeros. The order of the dimensions, the first innermost, is that of shared memory.
template <class Element, int kDims>
cute::TmaDescriptor map_rows(const Element* start, const MapDim (&dims)[kDims], const char* what) {
  static_assert(sizeof(Element) <= 2, "8 or 16 bits");
  constexpr auto kType = sizeof(Element) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  cuuint64_t sizes[kDims], strides[kDims];
  cuuint32_t box[kDims], every[kDims];
  for (int i = 0; i < kDims; ++i) {
    sizes[i] = cuuint64_t(dims[i].size);
    strides[i] = sizeof(Element) * cuuint64_t(dims[i].stride);
    box[i] = cuuint32_t(dims[i].box);
    every[i] = 1;
  }
  cute::TmaDescriptor map{};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      &map, kType, kDims, const_cast<Element*>(start), sizes, strides + 1, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, what, ": cuTensorMapEncodeTiled failed with error ", int(result));
  return map;
}
#endif

}  // namespace sparse24::cuda
