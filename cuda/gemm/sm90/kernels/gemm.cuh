// What the Hopper GEMMs share, sparse or dense: element types, schedules, and the launch of a CUTLASS kernel.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/device_kernel.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <type_traits>

#include "common/launch.cuh"
#include "sparse24/device.h"

namespace sparse24::cuda {

template <DType>
struct GemmElement;
template <>
struct GemmElement<DType::kBFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct GemmElement<DType::kFloat16> {
  using type = cutlass::half_t;
};
template <>
struct GemmElement<DType::kFloat8E4M3> {
  using type = cutlass::float_e4m3_t;
};

// Cooperative: two warpgroups share a tile. Pingpong: they work on a tile each, one's epilogue under the other's
// mainloop. fp8 accumulates fast, without promotion to a second accumulator.
template <bool kFp8, bool kPingpong>
using GemmSchedule =
    std::conditional_t<kFp8,
                       std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum,
                                          cutlass::gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum>,
                       std::conditional_t<kPingpong, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                          cutlass::gemm::KernelTmaWarpSpecializedCooperative>>;

// As many stages as fit beside the epilogue and its barriers.
template <class Epilogue>
using GemmStages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
    sizeof(typename Epilogue::SharedStorage) + cute::max(sizeof(typename Epilogue::PipelineStorage), size_t{128}))>;

// Completes `args` with the device, and launches. No workspace, no synchronisation.
template <class Kernel>
void launch_gemm(typename Kernel::Arguments args, cudaStream_t stream, const char* what) {
  using Cluster = typename Kernel::ClusterShape;
  args.multiprocessors = device_info().sm_count;

  constexpr auto kernel = cutlass::device_kernel<Kernel>;
  constexpr int kSharedBytes = Kernel::SharedStorageSize;
  allow_shared_memory<kernel>(kSharedBytes);
  const auto params = Kernel::params(args);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(cute::size<0>(Cluster{})), unsigned(cute::size<1>(Cluster{})), 1};
  // The kernel waits for its predecessor on the device, after its own set-up (griddepcontrol).
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = Kernel::grid(params);
  launch.blockDim = dim3(Kernel::MaxThreadsPerBlock);
  launch.dynamicSmemBytes = kSharedBytes;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = 2;
  check_cuda(cudaLaunchKernelEx(&launch, kernel, params), what);
}

}  // namespace sparse24::cuda
