// The kernel of mm_active: each warp reads the rows of w that its tokens use, and adds them up.
//
// A warp has 256 columns of w, up to 16 tokens and a slice of the neurons. It lists the neurons that some token uses
// and copies their rows into a ring in shared memory, as far ahead as that reaches; then each token takes those that it
// uses, in ascending order, by multiply-adds in float32. So a row of out does not depend on the other rows, nor on how
// many there are, and a zero meets no weight.
#pragma once

#include "few_tokens/active_slice.cuh"
#include "few_tokens/active_sums.cuh"

namespace sparse24::cuda {

// Eight columns of a row, in shared memory.
template <class W>
__device__ __forceinline__ void load_columns(uint32_t address, float (&of)[8]) {
  if constexpr (sizeof(W) == 2) {
    const uint4 v = load_shared4(address);
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    widen<W>(words, of);
  } else {
    const uint2 v = load_shared2(address);
    const uint32_t words[2] = {v.x, v.y};
    widen<W>(words, of);
  }
}

// Block (of a strip, group of tokens, strip).
template <class Y, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) mm_active_kernel(const ActiveLaunch launch) {
  const MmActiveArgs& args = launch.args;
  constexpr int kTokens = Tile::kTokens, kRing = Tile::kRing, kNeurons = Tile::kNeurons;
  extern __shared__ __align__(16) unsigned char shared[];
  using Tokens = ActiveTokens<Y, Tile>;
  using Rows = ActiveRows<W, Tile>;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned blocks = unsigned(launch.blocks), rank = blockIdx.x % blocks, index = blockIdx.x / blocks;
  const unsigned token_groups = unsigned(ceil_div(args.tokens, kTokens));
  const int token0 = int(index % token_groups) * kTokens, tokens = min(kTokens, int(args.tokens) - token0);
  const int strip0 = int(index / token_groups) * Tile::kColumns;
  const int features = int(args.features), slices = int(blocks) * Tile::kWarps, slice = int(rank) * Tile::kWarps + warp;
  const int begin = int(int64_t{features} * slice / slices), end = int(int64_t{features} * (slice + 1) / slices);
  const int steps = ceil_div(end - begin, kNeurons), half = lane / kNeurons, neuron = begin + lane % kNeurons;
  const Tokens of{static_cast<const uint16_t*>(args.y) + (token0 + half) * args.features + neuron, args.features,
                  tokens - half, end - neuron};
  auto* list = reinterpret_cast<uint16_t*>(shared + Tile::kWarps * Tile::kWarpBytes + warp * Tile::kListBytes);
  const uint32_t row_bytes = uint32_t(args.out_features) * uint32_t(sizeof(W));
  const uint32_t ring = shared_address(shared) + warp * Tile::kWarpBytes;
  const int piece = lane % Rows::kLanes * 16;
  const char* w = static_cast<const char*>(args.w) + int64_t{begin} * row_bytes + strip0 * int(sizeof(W)) + piece;
  wait_for_predecessors();

  float c[kTokens][8] = {};
  for (int first = 0; first < steps; first += Tile::kListed) {
    // ---- the list; lane s keeps which neurons of step s are used, and where their rows begin in it ----
    const int listed_steps = min(Tile::kListed, steps - first);
    uint32_t used_of_lane = 0;
    int start_of_lane = 0, listed = 0;
    constexpr int kBatch = kTokens <= 8 ? 8 : 4;  // whose loads do not wait for each other
    for (int s0 = 0; s0 < listed_steps; s0 += kBatch) {
      typename Tokens::Values values[kBatch];
#pragma unroll
      for (int s = 0; s < kBatch; ++s) of.load(first + s0 + s, values[s]);
#pragma unroll
      for (int s = 0; s < kBatch; ++s) {
        const uint32_t used = Tokens::used_by_any(values[s]);
        if (lane == s0 + s) {
          used_of_lane = used;
          start_of_lane = listed;
        }
        if (lane < kNeurons && (used >> lane & 1u)) {
          list[listed + __popc(used & ((1u << lane) - 1))] = uint16_t(kNeurons * (s0 + s) + lane);
        }
        listed += __popc(used);
      }
    }
    __syncwarp();

    // ---- the sums ----
    Rows rows{w + int64_t{kNeurons} * first * row_bytes, row_bytes,
              (int(args.out_features) - strip0) * int(sizeof(W)) - piece, ring + lane * 16};
    int place = 0;  // of the first row of this step
    typename Tokens::Values next;
    of.load(first, next);
    for (int s = 0; s < listed_steps; ++s) {
      typename Tokens::Values values;
#pragma unroll
      for (int j = 0; j < kTokens / 2; ++j) values[j] = next[j];
      of.load(first + s + 1, next);
      const uint32_t used = __shfl_sync(0xffffffffu, used_of_lane, s);
      const int start = __shfl_sync(0xffffffffu, start_of_lane, s), count = __popc(used);
      if (used == 0) continue;
      rows.copy_ahead(list, listed, start, lane);
      rows.wait(start + count);
      __syncwarp();

      int mine = place + __popc(used & ((1u << lane % kNeurons) - 1));  // the place of this lane's neuron
      if (mine >= kRing) mine -= kRing;
      const uint32_t row_of_lane = ring + mine * Tile::kRowBytes;
      place += count;
      if (place >= kRing) place -= kRing;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float value = to_float(Y{}, values[t / 2]);
        const uint32_t of_token = Tokens::used(values[t / 2]) & (t % 2 ? 0xffff0000u : 0xffffu);
        for (uint32_t left = of_token; left != 0; left &= left - 1) {
          const int from = __ffs(int(left)) - 1;
          const float factor = __shfl_sync(0xffffffffu, value, from);
          const uint32_t row = __shfl_sync(0xffffffffu, row_of_lane, from);
          float columns[8];
          load_columns<W>(row + lane * Tile::kOfLane * int(sizeof(W)), columns);
#pragma unroll
          for (int i = 0; i < 8; ++i) c[t][i] = __fmaf_rn(factor, columns[i], c[t][i]);
        }
      }
      __syncwarp();
    }
    wait_for_copies<0>();
    __syncwarp();
  }
  launch_dependents();

  // ---- in the place of the rows ----
  auto* sums = reinterpret_cast<float*>(shared + warp * Tile::kWarpBytes);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= tokens) break;
    auto* to = reinterpret_cast<float4*>(sums + t * Tile::kPitch + lane * Tile::kOfLane);
    to[0] = {c[t][0], c[t][1], c[t][2], c[t][3]};
    to[1] = {c[t][4], c[t][5], c[t][6], c[t][7]};
  }
  __syncthreads();
  add_active_sums<Tile>(launch, shared, index, rank, token0, tokens, strip0);
}

}  // namespace sparse24::cuda
