// The kernel of mm_active: each warp streams the rows of w that its tokens use through the tensor cores.
//
// A warp has a strip of columns of w, up to 32 tokens and a slice of the neurons, which it takes 32 at a time. Lane
// 4g + q of it
//   * loads y[g][8q .. 8q+7] of each eight tokens: the B fragments of two m16n8k16,
//   * loads rows 8q .. 8q+7 of w where some token uses them, 16 bytes at column 16 / sizeof(W) * g: pairs of
//     neighbouring columns of two rows become, transposed, the A fragments.
// So out.T = w.T y.T is summed, nothing passes through shared memory, and no list is made. Which neurons share an
// instruction is fixed, so a row of out does not depend on the other rows, nor on how many there are.
#pragma once

#include <type_traits>

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/mma.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// kEights: of tokens. kVectors: y and w can be loaded 16 bytes at a time.
template <class W, int kEights_, bool kVectors_>
struct ActiveTile {
  static constexpr int kEights = kEights_, kTokens = 8 * kEights;
  static constexpr bool kVectors = kVectors_;
  static constexpr int kVec = 16 / int(sizeof(W)), kColumns = 8 * kVec;
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  // Blocks of a multiprocessor: as many as leave registers for the sums.
  static constexpr int kResident = kVectors && kEights * kVec <= 16 ? 2 : 1;
  static constexpr int kNeurons = 32;          // of a step
  static constexpr int kFetched = 4;           // steps whose rows are on the way to the second-level cache
  static constexpr int kPitch = kColumns + 8;  // of a token's sums in shared memory
  static constexpr int kSumBytes = kWarps * kTokens * kPitch * 4;
  static constexpr int kSharedBytes = kSumBytes + 16 * kThreads;
};

// The blocks of a strip are as many as fill 132 multiprocessors twice, for any number of tokens. Each adds up its
// warps, and the last one that has done so adds up the blocks, in order. They are no cluster: clusters of more than two
// blocks do not fill the multiprocessors.
struct ActiveLaunch {
  MmActiveArgs args;
  int blocks;     // of a strip
  float* sums;    // [blocks][tokens][pitch]
  int pitch;      // whole strips
  int* arrivals;  // [strips][groups of tokens], zeros at the start
};

template <class T>
__device__ __forceinline__ void store_as(void* out, int64_t i, float v) {
  if constexpr (std::is_same_v<T, float>) {
    static_cast<float*>(out)[i] = v;
  } else {
    static_cast<uint16_t*>(out)[i] = uint16_t(pack2(T{}, v, 0.f));
  }
}
__device__ __forceinline__ void store_as(DType dtype, void* out, int64_t i, float v) {
  if (dtype == DType::kFloat32) return store_as<float>(out, i, v);
  if (dtype == DType::kBFloat16) return store_as<__nv_bfloat16>(out, i, v);
  store_as<__half>(out, i, v);
}
__device__ __forceinline__ float load_as(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? to_float(__nv_bfloat16{}, bits) : to_float(__half{}, bits);
}

// 16 bytes of a row, zeros behind its `count` elements, where `exists` is not zero; where it is, v stays. kConstant:
// nobody writes them while this kernel runs.
template <class T, bool kVectors, bool kConstant>
__device__ __forceinline__ void load_part(uint32_t exists, uint4& v, const void* from, int count) {
  if constexpr (kVectors && kConstant) {
    v = load_once_if(exists, v, from);
  } else if constexpr (kVectors) {
    v = load_if(exists, v, from);
  } else if (exists != 0) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t>;
    constexpr int kPerWord = 4 / int(sizeof(T));
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 4 * kPerWord; ++i) {
      if (i >= count) continue;
      words[i / kPerWord] |= uint32_t{static_cast<const Bits*>(from)[i]} << (i % kPerWord * 8 * int(sizeof(T)));
    }
    v = {words[0], words[1], words[2], words[3]};
  }
}

// Which of eight elements of 16 bits are not zero: element i has bit bit_of(i).
__device__ __forceinline__ int bit_of(int i) { return i % 2 * 4 + i / 2; }
__device__ __forceinline__ uint32_t not_zero(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t bits = 0;  // of the even elements from 0 on, of the odd ones from 16 on
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // The sum carries into the sign where there is any other bit.
    bits |= ((words[i] & 0x7fff7fffu) + 0x7fff7fffu) >> (15 - i) & 0x00010001u << i;
  }
  return (bits | bits >> 12) & 0xffu;
}
__device__ __forceinline__ uint4 operator|(const uint4& a, const uint4& b) {
  return {a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w};
}
__device__ __forceinline__ uint32_t word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Two neighbouring columns of four rows, as the A fragment of a tile whose rows g and g + 8 are these columns.
template <class Y, class W>
__device__ __forceinline__ void transpose(const uint4 (&rows)[8], int first_row, int pair, uint32_t (&a)[4]) {
  uint32_t columns[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (sizeof(W) == 2) {
      columns[r] = word_of(rows[first_row + r], pair);
    } else {
      columns[r] = e4m3x2_to_pair(Y{}, uint16_t(word_of(rows[first_row + r], pair / 2) >> (pair % 2 * 16)));
    }
  }
  a[0] = __byte_perm(columns[0], columns[1], 0x5410);
  a[1] = __byte_perm(columns[0], columns[1], 0x7632);
  a[2] = __byte_perm(columns[2], columns[3], 0x5410);
  a[3] = __byte_perm(columns[2], columns[3], 0x7632);
}

// Block (of a strip, strip, group of tokens).
template <class Y, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kResident) mm_active_kernel(const ActiveLaunch launch) {
  const MmActiveArgs& args = launch.args;
  constexpr int kEights = Tile::kEights, kTokens = Tile::kTokens, kVec = Tile::kVec, kPairs = kVec / 2;
  constexpr int kNeurons = Tile::kNeurons, kFetched = Tile::kFetched;
  extern __shared__ __align__(16) unsigned char shared[];
  auto* sums = reinterpret_cast<float*>(shared);  // [warps][tokens][columns]

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4;
  const unsigned blocks = unsigned(launch.blocks), rank = blockIdx.x % blocks;
  const unsigned groups = unsigned(ceil_div(args.tokens, kTokens)), strip = blockIdx.x / blocks / groups;
  const int token0 = int(blockIdx.x / blocks % groups) * kTokens, tokens = min(kTokens, int(args.tokens) - token0);
  const int strip0 = int(strip) * Tile::kColumns, column = strip0 + g * kVec;
  const int features = int(args.features), out_features = int(args.out_features);
  const int steps = ceil_div(features, kNeurons), slices = int(blocks) * Tile::kWarps;
  const int slice = int(rank) * Tile::kWarps + warp;
  const int begin = int(int64_t{steps} * slice / slices), end = int(int64_t{steps} * (slice + 1) / slices);
  // Of the first step: this lane's neurons of y, the first row that it multiplies, and the one that it prefetches.
  const auto* y_lane = static_cast<const uint16_t*>(args.y) + (token0 + g) * args.features + 8 * q;
  const auto* w = static_cast<const char*>(args.w);
  const uint32_t row_bytes = uint32_t(out_features) * uint32_t(sizeof(W));
  const int64_t step_bytes = int64_t{kNeurons} * row_bytes;
  const char* const lane_rows = w + int64_t{8 * q} * row_bytes + column * int64_t{sizeof(W)};
  const char* const lane_row = w + int64_t{lane} * row_bytes + strip0 * int64_t{sizeof(W)};
  const uint32_t lane_rows_mask = column < out_features ? 0xffu : 0;
  const uint32_t lane_row_mask = 1u << (lane / 8 * 8 + bit_of(lane % 8));
  const uint32_t nowhere = shared_address(shared + Tile::kSumBytes + 16 * threadIdx.x);

  int only = -1;  // the one token that is summed, or all
  const auto load_y = [&](int step, uint4(&to)[kEights]) {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
      const int token = 8 * e + g, count = features - 8 * q - step * kNeurons;
      const bool exists = step < end && count > 0 && token < tokens && (only < 0 || only == token);
      to[e] = uint4{0, 0, 0, 0};
      load_part<uint16_t, Tile::kVectors, false>(exists, to[e], y_lane + 8 * e * args.features + step * kNeurons,
                                                 count);
    }
  };
  // Which neurons of a step are used, the same in all lanes; asks for their rows.
  const auto fetch = [&](int step, const uint4(&of)[kEights]) -> uint32_t {
    uint4 any = of[0];
#pragma unroll
    for (int e = 1; e < kEights; ++e) any = any | of[e];
    const uint32_t used = __reduce_or_sync(0xffffffffu, not_zero(any) << (8 * q));
    if constexpr (Tile::kVectors && kEights == 1) {
      prefetch_if(used & lane_row_mask, nowhere, lane_row + step * step_bytes);
    }
    return used;
  };
  uint4 rows[8] = {};
  // Four of a lane's eight rows: those of one instruction. Those that are not used may stay: their y is zero.
  const auto load_rows = [&](auto careful, int step, int half, uint32_t used) {
    const char* from = lane_rows + step * step_bytes;
    const uint32_t mine = used >> (8 * q) & lane_rows_mask;
#pragma unroll
    for (int i = 4 * half; i < 4 * half + 4; ++i) {
      if constexpr (decltype(careful)::value) rows[i] = uint4{0, 0, 0, 0};
      load_part<W, Tile::kVectors, true>(mine & 1u << bit_of(i), rows[i], from + uint64_t{row_bytes} * i,
                                         out_features - column);
    }
  };
  float c[kEights][kPairs][4];
  const auto sum_slice = [&](auto careful) {
    uint4 of[kEights], next[kEights];
    uint32_t used[kFetched];
    {
      uint4 first[kFetched][kEights];
#pragma unroll
      for (int d = 0; d < kFetched; ++d) load_y(begin + d, first[d]);
#pragma unroll
      for (int d = 0; d < kFetched; ++d) used[d] = fetch(begin + d, first[d]);
#pragma unroll
      for (int e = 0; e < kEights; ++e) of[e] = first[0][e];
    }
    load_rows(careful, begin, 0, used[0]);
    load_rows(careful, begin, 1, used[0]);
    load_y(begin + kFetched, next);

#pragma unroll 1
    for (int step = begin; step < end; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
          uint32_t a[4];
          transpose<Y, W>(rows, 4 * half, p, a);
#pragma unroll
          for (int e = 0; e < kEights; ++e) {
            multiply(Y{}, c[e][p], a, word_of(of[e], 2 * half), word_of(of[e], 2 * half + 1));
          }
        }
        load_rows(careful, step + 1, half, used[1]);
      }
      load_y(step + 1, of);
#pragma unroll
      for (int d = 1; d < kFetched; ++d) used[d - 1] = used[d];
      used[kFetched - 1] = fetch(step + kFetched, next);
      load_y(step + kFetched + 1, next);
    }
  };

  wait_for_predecessors();
  // A row is multiplied for all tokens, whose zeros then add nothing, unless a weight is infinite or NaN: that shows in
  // the sums, and such a token is summed again alone, with care that rows which it does not use are zeros.
  for (uint32_t again = 0;;) {
#pragma unroll
    for (int i = 0; i < kEights * kPairs * 4; ++i) c[i / 4 / kPairs][i / 4 % kPairs][i % 4] = 0.f;
    if (only < 0) {
      sum_slice(std::false_type{});
    } else {
      sum_slice(std::true_type{});
    }

    uint32_t nan = 0;  // a bit for each token
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 8 * e + 2 * q + i;
          const float2 v{c[e][p][i], c[e][p][2 + i]};
          if (v.x != v.x || v.y != v.y) nan |= 1u << token;
          if (only >= 0 && only != token) continue;
          *reinterpret_cast<float2*>(sums + (warp * kTokens + token) * Tile::kPitch + g * kVec + 2 * p) = v;
        }
      }
    }
    if (only < 0) again = __reduce_or_sync(0xffffffffu, nan);
    if (again == 0) break;
    only = __ffs(int(again)) - 1;
    again &= again - 1;
  }
  __syncthreads();

  constexpr int kQuads = Tile::kColumns / 4;
  const auto add = [](float4& to, const float4& from) {
    to = {__fadd_rn(to.x, from.x), __fadd_rn(to.y, from.y), __fadd_rn(to.z, from.z), __fadd_rn(to.w, from.w)};
  };
  const auto quad_at = [&](int of_warp, int i) {
    return reinterpret_cast<float4*>(sums + (of_warp * kTokens + i / kQuads) * Tile::kPitch + i % kQuads * 4);
  };
  const auto sum_at = [&](unsigned block, int i) {
    const int64_t row = block * args.tokens + token0 + i / kQuads;
    return reinterpret_cast<float4*>(launch.sums + row * launch.pitch + strip0 + i % kQuads * 4);
  };
  for (int i = threadIdx.x; i < tokens * kQuads; i += Tile::kThreads) {
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int s = 0; s < Tile::kWarps; ++s) add(total, *quad_at(s, i));
    __stcg(sum_at(rank, i), total);
  }
  __threadfence();
  __syncthreads();
  const bool arrives_last =
      threadIdx.x == 0 && atomicAdd(launch.arrivals + blockIdx.x / blocks, 1) == launch.blocks - 1;
  if (!__syncthreads_or(arrives_last)) return;
  __threadfence();

  for (int i = threadIdx.x; i < tokens * kQuads; i += Tile::kThreads) {
    const int64_t token = token0 + i / kQuads;
    const int from = strip0 + i % kQuads * 4;
    if (from >= out_features) continue;
    float4 total{0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
    for (unsigned b = 0; b < blocks; ++b) add(total, __ldcg(sum_at(b, i)));
    const float of_column[4] = {total.x, total.y, total.z, total.w};
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (from + v >= out_features) break;
      float sum = of_column[v];
      if (args.scale_w != nullptr) sum = __fmul_rn(sum, args.scale_w[args.scale_w_per_column ? from + v : 0]);
      if (args.bias != nullptr) sum = __fadd_rn(sum, load_as(args.bias_dtype, args.bias, from + v));
      store_as(args.out_dtype, args.out, token * out_features + from + v, sum);
    }
  }
}

}  // namespace sparse24::cuda
