// Launches of the kernels for few tokens, and the order of dependent ones.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"

namespace sparse24::cuda {

// What a block of a Hopper multiprocessor can have.
constexpr int kMaxSharedBytes = 227 * 1024;

struct FewGrid {
  int64_t blocks;
  int threads, shared_bytes;
  int cluster = 1;
  // It may start before the kernel in front of it is complete, and waits for it itself.
  bool dependent = false;
};

// kernel<<<...>>>(args)
template <auto Kernel, class Args>
void launch_few(const char* name, const FewGrid& grid, const Args& args, cudaStream_t stream) {
  if (grid.shared_bytes > 0) allow_shared_memory<Kernel>(kMaxSharedBytes);  // once, for every size
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (grid.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(grid.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, Kernel, args), name);
}

}  // namespace sparse24::cuda
