// Launches of the kernels for few tokens, and the order of dependent ones.
//
// They take the driver's own launch. The runtime's, of which the library has its own, would be code and tables that
// nobody else uses: in a model they come from cold caches in each call.
#pragma once

#include <cuda.h>
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

// A function of the driver, which the library is not linked with.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
  check(found != nullptr, "sparse24: the driver has no ", name);
  return reinterpret_cast<Function*>(found);
}

inline CUcontext current_context() {
  static const auto function = driver_function<decltype(cuCtxGetCurrent)>("cuCtxGetCurrent");
  CUcontext context = nullptr;
  check_cuda(cudaError_t(function(&context)), "cuCtxGetCurrent");
  return context;
}

// A kernel of the current context, found once by a thread that stays in it. `shared`: it may have all shared memory.
template <auto Kernel>
CUfunction function_in_context(bool shared) {
  thread_local struct {
    CUcontext context = nullptr;
    cudaFunction_t function = nullptr;
  } known;
  if (const CUcontext context = current_context(); context == nullptr || context != known.context) {
    if (shared) allow_shared_memory<Kernel>(kMaxSharedBytes);  // once, for every size
    check_cuda(cudaGetFuncBySymbol(&known.function, reinterpret_cast<const void*>(Kernel)), "cudaGetFuncBySymbol");
    known.context = current_context();
  }
  return known.function;
}

// How many clusters of kBlocks blocks, each of which has a multiprocessor for itself, run at a time: multiprocessors
// come in groups, which no cluster leaves.
template <auto Kernel, int kThreads, int kBlocks>
int clusters_at_a_time() {
  static std::atomic<int> known[64];
  std::atomic<int>& of_device = known[current_device() & 63];
  int clusters = of_device.load(std::memory_order_relaxed);
  if (clusters != 0) return clusters;
  allow_shared_memory<Kernel>(kMaxSharedBytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = kBlocks;
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kMaxSharedBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, Kernel, &config), "cudaOccupancyMaxActiveClusters");
  if (clusters < 1) clusters = 1;
  of_device.store(clusters, std::memory_order_relaxed);
  return clusters;
}

// kernel<<<...>>>(args)
template <auto Kernel, class Args>
void launch_few(const char* name, const FewGrid& grid, const Args& args, cudaStream_t stream) {
  static const auto launch = driver_function<decltype(cuLaunchKernelEx)>("cuLaunchKernelEx");
  CUlaunchAttribute attributes[2];
  unsigned count = 0;
  if (grid.dependent) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[count++].value.programmaticStreamSerializationAllowed = 1;
  }
  if (grid.cluster > 1) {
    attributes[count].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attributes[count++].value.clusterDim = {unsigned(grid.cluster), 1, 1};
  }
  CUlaunchConfig config{};
  config.gridDimX = unsigned(grid.blocks);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = unsigned(grid.threads);
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = unsigned(grid.shared_bytes);
  config.hStream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* parameters[] = {const_cast<Args*>(&args)};
  check_cuda(cudaError_t(launch(&config, function_in_context<Kernel>(grid.shared_bytes > 0), parameters, nullptr)),
             name);
}

}  // namespace sparse24::cuda
