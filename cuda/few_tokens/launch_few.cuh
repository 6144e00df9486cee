// Launches of the kernels for few tokens: clusters, and the order of dependent launches.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"

namespace sparse24::cuda {

// What a block of a Hopper multiprocessor can have.
constexpr int kMaxSharedBytes = 227 * 1024;

// kernel<<<blocks, threads, shared_bytes, stream>>>(args) in clusters; with `dependent` it may start before the kernel
// in front of it is complete, and waits for it itself.
template <auto Kernel, class Args>
void launch_few(const char* name, int64_t blocks, int threads, int shared_bytes, int cluster, bool dependent,
                const Args& args, cudaStream_t stream) {
  allow_shared_memory<Kernel>(kMaxSharedBytes);  // once, for every size
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = unsigned(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = dependent ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, Kernel, args), name);
}

}  // namespace sparse24::cuda
