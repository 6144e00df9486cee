// Run-time choices turned into template arguments.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sparse24/error.h"
#include "sparse24/types.h"

namespace sparse24::cuda {

// f(T{}) for the 16-bit float type T that `dtype` names.
template <class F>
void dispatch_16bit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
    default: fail("sparse24: expected bfloat16 or float16 on the GPU, got ", name_of(dtype));
  }
}

}  // namespace sparse24::cuda
