// The first product for more than eight tokens: it writes y as it is, and which neurons are used.
#pragma once

#include "few_tokens/linear_few.cuh"
#include "few_tokens/used_neurons.h"

namespace sparse24::cuda {

struct LinearUsedLaunch {
  LinearFewArgs args;  // whose y is that of `neurons`
  UsedNeurons neurons;
};

template <class Tile>
struct UsedSink {
  const UsedNeurons& neurons;
  LinearRows rows;
  int64_t all;  // neurons
  int tokens;
  uint8_t* used;  // [kPassRows] in shared memory, zeros between passes

  __device__ __forceinline__ void begin_end(int pass) const {
    if (pass + 1 == rows.passes) launch_dependents();
  }
  __device__ __forceinline__ void store(int token, int pass0, int row, uint16_t value) const {
    neurons.y[token * neurons.pitch + rows.first + pass0 + row] = value;
    if (value != 0) used[row] = 1;
  }
  __device__ __forceinline__ void end(int pass, int pass_rows) const {
    const int row = threadIdx.x;
    const int64_t neuron = rows.first + pass * rows.of_pass + row;
    if (row < pass_rows) {
      neurons.used[neuron] = used[row];
      used[row] = 0;
    }
    // Up to a whole step.
    if (neuron < all || neuron >= neurons.pitch) return;
    neurons.used[neuron] = 0;
    for (int token = 0; token < tokens; ++token) neurons.y[token * neurons.pitch + neuron] = 0;
  }
};

// The rows of a block: as many as others have, in passes of about as many.
template <class Tile>
__device__ __forceinline__ LinearRows rows_of_block(int64_t out) {
  const int64_t first = out * blockIdx.x / gridDim.x;
  const int rows = int(out * (blockIdx.x + 1) / gridDim.x - first);
  const int passes = (rows + Tile::kPassRows - 1) / Tile::kPassRows;
  return {first, passes, passes > 0 ? (rows + passes - 1) / passes : 0, rows};
}

template <class T, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_used_kernel(const LinearUsedLaunch launch) {
  extern __shared__ __align__(16) unsigned char shared[];
  const LinearRows rows = rows_of_block<Tile>(launch.args.out);
  auto* used = shared + Tile::kRingBytes + Tile::kSumBytes;
  const UsedSink<Tile> sink{launch.neurons, rows, launch.args.out, int(launch.args.tokens), used};
  for (int i = threadIdx.x; i < Tile::kPassRows; i += Tile::kThreads) used[i] = 0;
  wait_for_predecessors();
  if (rows.passes > 0) multiply_rows<T, W, Tile>(launch.args, rows, shared, sink);
}

}  // namespace sparse24::cuda
