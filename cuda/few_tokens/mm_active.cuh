// The kernel of mm_active: the rows of w that up to eight tokens use, each read once.
//
// A pair of blocks has a slice of the neurons, each block half of the columns. The sums of a token are chains of
// multiply-adds over its own neurons, in ascending order and without those whose y is zero: of the even and the odd
// neurons of each slice, and then of the slices in order. So a row of out depends on its row of y alone, on the sizes
// of w, and on nothing else.
#pragma once

#include "few_tokens/active_sums.cuh"

namespace sparse24::cuda {

template <class Y, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) mm_active_kernel(const ActiveLaunch launch) {
  const MmActiveArgs& args = launch.args;
  constexpr int kTokens = Tile::kTokens;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* activations = reinterpret_cast<uint16_t*>(shared + Tile::kRingBytes);
  const int rank = blockIdx.x % 2, slice = blockIdx.x / 2, tokens = int(args.tokens);
  const int begin = int(active_slice(args.features, slice)), end = int(active_slice(args.features, slice + 1));
  wait_for_predecessors();

  for (int strip = 0, strips = 1; strip < strips; ++strip) {
    const auto columns = ActiveColumns::of<Tile>(args.out_features, strip, rank);
    strips = columns.strips;
    float c[kTokens][8] = {};
    for (int first = begin; first < end; first += Tile::kNeurons) {
      const int neurons = min(Tile::kNeurons, end - first);
      __syncthreads();
      for (int i = threadIdx.x; i < neurons; i += Tile::kThreads) {
        const auto* y = static_cast<const uint16_t*>(args.y) + first + i;
        uint16_t values[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) values[t] = t < tokens ? y[t * args.features] : uint16_t(0);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) activations[i * kTokens + t] = values[t];
      }
      __syncthreads();
      auto rows = ActiveRows<Y, W, Tile>::of(args, first, columns, shared_address(activations), shared_address(shared));
      rows.known = neurons;
      rows.add_all(0, c);
    }
    if (strip + 1 == strips) launch_dependents();
    store_active_sums<Tile>(launch, shared, slice, columns, c);
  }
}

}  // namespace sparse24::cuda
