// A whole network for up to eight tokens in one kernel, and one that adds up its sums.
//
// A pair of blocks, a cluster, has a slice of the neurons: it multiplies their rows of W1, and then those of W2 that
// are used, which are asked for while W1 still comes in. So nobody waits for the others between the two products. The
// blocks of a pair share the neurons in the first product, the columns in the second, and give each other their y.
#pragma once

#include "few_tokens/linear_few.cuh"
#include "few_tokens/mm_active.cuh"

namespace sparse24::cuda {

// kStages: of the rings, which both products use.
template <class W, int kTokens, int kStages>
struct NetworkTile {
  using Linear = LinearTile<16, 1, 256, kStages, true>;
  using Active = ActiveTile<W, kTokens, true, kStages, Linear::kStageBytes>;
  static_assert(Linear::kRingBytes == Active::kRingBytes && Linear::kStageBytes == Active::kStageBytes);
  static constexpr int kThreads = Linear::kThreads;

  // Where y lies, behind what the first product has.
  SPARSE24_HD static int activations_at(const LinearFewArgs& args) {
    return int(round_up(LinearShape<Linear, int(sizeof(W))>::shared_bytes(args.in, args.tokens), 16));
  }
  SPARSE24_HD static int64_t shared_bytes(const LinearFewArgs& args) {
    return activations_at(args) + Active::activation_bytes(int(ceil_div(args.out, kActiveSlices)));
  }
};

struct NetworkLaunch {
  LinearFewArgs first;
  ActiveLaunch second;
};

// Takes what the first product gives: y, for both blocks of the pair, and time to copy rows of W2.
template <class Rows, class Tile>
struct NetworkSink {
  Rows& rows;
  uint16_t* y;        // of this block's first row
  uint32_t there;     // the same in the other block
  int of_pass;        // of both blocks
  int neurons, mine;  // of both blocks, and from this block's first row on
  int given = 0;      // neurons whose y both blocks have given
  bool waits = true;  // for the other block

  __device__ __forceinline__ void settle() {
    if (!waits) return;
    wait_for_cluster();
    waits = false;
    rows.known = given;
  }
  __device__ __forceinline__ void behind(int stage) {
    settle();
    rows.copy(stage);
  }
  __device__ __forceinline__ void begin_end(int) { settle(); }
  __device__ __forceinline__ void store(int token, int row, uint16_t value) const {
    y[row * Tile::kTokens + token] = value;
  }
  __device__ __forceinline__ void end(int pass) {
    const int first = pass * of_pass, rows_here = min(of_pass / 2, mine - first);
    for (int i = threadIdx.x; i < rows_here * Tile::kTokens / 2; i += Tile::kThreads) {
      const int at = first * Tile::kTokens / 2 + i;
      store_cluster(there + at * 4, reinterpret_cast<const uint32_t*>(y)[at]);
    }
    arrive_at_cluster();
    waits = true;
    given = min(neurons, (pass + 1) * of_pass);
  }
};

template <class T, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) relu2_mlp_few_kernel(const NetworkLaunch launch) {
  const LinearFewArgs& first = launch.first;
  const MmActiveArgs& second = launch.second.args;
  using Linear = typename Tile::Linear;
  using Active = typename Tile::Active;
  extern __shared__ __align__(16) unsigned char shared[];
  const uint32_t rings = shared_address(shared), activations = rings + Tile::activations_at(first);
  const int rank = blockIdx.x % 2, slice = blockIdx.x / 2;
  wait_for_predecessors();
  const int begin = int(active_slice(first.out, slice)), neurons = int(active_slice(first.out, slice + 1)) - begin;

  // Both blocks have as many passes, however many rows there are.
  const int passes = max(1, (neurons + 2 * Linear::kPassRows - 1) / (2 * Linear::kPassRows));
  const int of_pass = (neurons + 2 * passes - 1) / (2 * passes);
  const LinearRows rows_of_w1{begin + rank * of_pass, passes, of_pass, 2 * of_pass, neurons - rank * of_pass};
  // Of tokens that do not exist.
  for (int i = threadIdx.x; i < Active::activation_bytes(neurons) / 4; i += Tile::kThreads) {
    reinterpret_cast<uint32_t*>(shared + Tile::activations_at(first))[i] = 0;
  }

  auto columns = ActiveColumns::of<Active>(second.out_features, 0, rank);
  auto rows = ActiveRows<T, W, Active>::of(second, begin, columns, activations, rings);
  const int offset = rank * of_pass * Active::kTokens * 2;
  NetworkSink<ActiveRows<T, W, Active>, Active> sink{
      rows,
      reinterpret_cast<uint16_t*>(shared + Tile::activations_at(first) + offset),
      address_of_block(activations + offset, rank ^ 1),
      2 * of_pass,
      neurons,
      neurons - rank * of_pass};
  __syncthreads();
  arrive_at_cluster();  // both blocks run, and their y is empty
  int stage = multiply_rows<T, W, Linear>(first, rows_of_w1, shared, sink);
  sink.settle();

  for (int strip = 0;;) {
    float c[Active::kTokens][8] = {};
    rows.add_all(stage, c);
    if (++strip == columns.strips) launch_dependents();
    store_active_sums<Active>(launch.second, shared, slice, columns, c);
    if (strip == columns.strips) return;
    __syncthreads();
    columns = ActiveColumns::of<Active>(second.out_features, strip, rank);
    rows = ActiveRows<T, W, Active>::of(second, begin, columns, activations, rings);
    rows.known = neurons;
    stage = 0;
  }
}

}  // namespace sparse24::cuda
