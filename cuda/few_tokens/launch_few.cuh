// Launches of the kernels for few tokens, and the order of dependent ones.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"

namespace sparse24::cuda {

// What a block of a Hopper multiprocessor can have.
constexpr int kMaxSharedBytes = 227 * 1024;

// kernel<<<blocks, threads, shared_bytes, stream>>>(args); with `dependent` it may start before the kernel in front of
// it is complete, and waits for it itself.
template <auto Kernel, class Args>
void launch_few(const char* name, int64_t blocks, int threads, int shared_bytes, bool dependent, const Args& args,
                cudaStream_t stream) {
  allow_shared_memory<Kernel>(kMaxSharedBytes);  // once, for every size
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, Kernel, args), name);
}

}  // namespace sparse24::cuda
