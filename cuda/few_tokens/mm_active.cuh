// The kernel of mm_active: gathers the rows of w that some token uses, and multiplies each for the tokens that use it.
#pragma once

#include "few_tokens/active_list.cuh"
#include "few_tokens/asynchronous.cuh"
#include "few_tokens/weights.cuh"

namespace sparse24::cuda {

// How a block's warps share a tile of features: kParts of them, each lane with kVec features, for a token; what is left
// takes further tokens, kTokens a warp.
template <int kVec_, int kParts_, int kTokens_, int kWarps_ = 8>
struct ActiveTile {
  static constexpr int kVec = kVec_, kParts = kParts_, kTokens = kTokens_, kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kFeatures = 32 * kVec * kParts;
  static constexpr int kSlots = kWarps / kParts;          // tokens at a time
  static constexpr int kMaxTokens = kSlots * kTokens;     // tokens in all
  static constexpr int kNeurons = 8 * kThreads;           // listed at a time
  static constexpr int kRows = 32;                        // of a stage: one for each lane
  static constexpr int kUnroll = 4;                       // multiply-adds whose operands are loaded together
  static constexpr int kBlocks = kWarps > 8 ? 1 : kVec * kTokens > 8 ? 2 : 3;  // of a multiprocessor, at least
};

// What a lane needs to multiply a row: the activation, and where the row lies in shared memory.
struct Used {
  float y;
  uint32_t row;
};

template <class Tile, class W>
struct ActiveStorage {
  static constexpr int kRowBytes = Tile::kFeatures * int(sizeof(W));
  static constexpr int kStageBytes = Tile::kRows * kRowBytes;
  static constexpr int kStages = kRowBytes >= 512 ? 4 : kRowBytes >= 256 ? 6 : 8;

  alignas(16) Used used[Tile::kWarps][Tile::kRows + Tile::kUnroll];
  alignas(16) unsigned char zeros[kRowBytes];
  union {
    alignas(16) unsigned char stages[kStages][kStageBytes];
    alignas(16) float sums[Tile::kMaxTokens][Tile::kFeatures];  // when all is multiplied
  };
  uint16_t list[Tile::kNeurons];
  int totals[Tile::kWarps];
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

// Block (slice, tile) of a grid whose clusters are the slices of one tile. Nothing that a token's sum goes through
// depends on the other tokens, nor on Tile.
template <class Y, class W, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) mm_active_kernel(const MmActiveArgs args) {
  using Storage = ActiveStorage<Tile, W>;
  constexpr int kVec = Tile::kVec, kStages = Storage::kStages, kRowBytes = Storage::kRowBytes;
  extern __shared__ __align__(16) unsigned char shared[];
  Storage& storage = *reinterpret_cast<Storage*>(shared);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int part = warp % Tile::kParts, slot = warp / Tile::kParts, tokens = int(args.tokens);
  const int64_t column0 = int64_t{blockIdx.x / kActiveSlices} * Tile::kFeatures, slice = active_slice(args.features);
  const int64_t begin = slice * (blockIdx.x % kActiveSlices), end = min(begin + slice, args.features);
  const auto* y = static_cast<const uint16_t*>(args.y);
  const auto* w = static_cast<const unsigned char*>(args.w);
  const int64_t row_bytes = args.out_features * int64_t{sizeof(W)};
  const bool words = args.features % 8 == 0 && reinterpret_cast<uintptr_t>(args.y) % 16 == 0;
  const bool vectors = row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(args.w) % 16 == 0;
  const uint32_t lane_offset = uint32_t(part * 32 + lane) * kVec * sizeof(W);

  for (int i = threadIdx.x; i < kRowBytes / 4; i += Tile::kThreads) reinterpret_cast<uint32_t*>(storage.zeros)[i] = 0;

  float sums[Tile::kTokens][kVec] = {};
  wait_for_predecessors();

  for (int64_t first = begin; first < end; first += Tile::kNeurons) {
    __syncthreads();  // list and stages are free, zeros are written
    const int count = list_used<Tile::kWarps>(
        used_of_eight(y, args.active, tokens, args.features, first + 8 * threadIdx.x, end, words), storage.list,
        storage.totals);
    const int batches = (count + Tile::kRows - 1) / Tile::kRows;

    // Rows `batch` * 32 and following of the list, to their stage.
    const auto fetch = [&](int batch) {
      const int rows = min(Tile::kRows, count - batch * Tile::kRows);
      unsigned char* stage = storage.stages[batch % kStages];
      const uint16_t* list = storage.list + batch * Tile::kRows;
      if (vectors) {
        constexpr int kChunks = kRowBytes / 16;
        const uint32_t to = shared_address(stage);
#pragma unroll
        for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
          const int row = i / kChunks, at = i % kChunks * 16;
          if (row < rows && column0 * int(sizeof(W)) + at < row_bytes) {
            copy16_async(to + row * kRowBytes + at, w + (first + list[row]) * row_bytes + column0 * int(sizeof(W)) + at);
          }
        }
      } else {
        for (int i = threadIdx.x; i < rows * Tile::kFeatures; i += Tile::kThreads) {
          const int row = i / Tile::kFeatures, at = i % Tile::kFeatures;
          if (column0 + at >= args.out_features) continue;
          using Bits = std::conditional_t<sizeof(W) == 2, uint16_t, uint8_t>;
          reinterpret_cast<Bits*>(stage)[i] =
              reinterpret_cast<const Bits*>(w)[(first + list[row]) * args.out_features + column0 + at];
        }
      }
    };
    // Activations of the tokens of this warp, at the row of the batch that is this lane's.
    uint32_t next[Tile::kTokens] = {};
    const auto look_up = [&](int batch) {
      const int at = batch * Tile::kRows + lane;
      const int64_t neuron = at < count ? first + storage.list[at] : -1;
#pragma unroll
      for (int i = 0; i < Tile::kTokens; ++i) {
        const int token = slot + Tile::kSlots * i;
        next[i] = token < tokens && neuron >= 0 ? y[token * args.features + neuron] : 0;
      }
    };

#pragma unroll
    for (int batch = 0; batch < kStages - 1; ++batch) {
      if (batch < batches) fetch(batch);
      commit_copies();
    }
    look_up(0);
    for (int batch = 0; batch < batches; ++batch) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      if (batch + kStages - 1 < batches) fetch(batch + kStages - 1);
      commit_copies();
      uint32_t bits[Tile::kTokens];
#pragma unroll
      for (int i = 0; i < Tile::kTokens; ++i) bits[i] = next[i];
      if (batch + 1 < batches) look_up(batch + 1);

      const uint32_t stage = shared_address(storage.stages[batch % kStages]);
      Used* mine = storage.used[warp];
      const uint32_t used_at = shared_address(mine);
#pragma unroll
      for (int i = 0; i < Tile::kTokens; ++i) {
        const bool active = (bits[i] & 0x7fff) != 0;
        const uint32_t mask = __ballot_sync(0xffffffffu, active);
        if (mask == 0) continue;
        const int rows = __popc(mask);
        __syncwarp();
        if (active) {
          mine[__popc(mask & ((1u << lane) - 1))] = {to_float(Y{}, uint16_t(bits[i])), stage + lane * kRowBytes};
        }
        // Rows of zeros round the number up: they add nothing.
        if (lane < Tile::kUnroll - 1) mine[rows + lane] = {0.f, shared_address(storage.zeros)};
        __syncwarp();
        for (int row = 0; row < rows; row += Tile::kUnroll) {
          constexpr int kWords = (kVec * int(sizeof(W)) + 3) / 4;
          uint32_t words_of[Tile::kUnroll][kWords];
          float factor[Tile::kUnroll];
#pragma unroll
          for (int j = 0; j < Tile::kUnroll; j += 2) {
            const uint4 two = load_shared4(used_at + (row + j) * uint32_t(sizeof(Used)));
            factor[j] = __uint_as_float(two.x);
            factor[j + 1] = __uint_as_float(two.z);
            load_row<kVec * int(sizeof(W))>(two.y + lane_offset, words_of[j]);
            load_row<kVec * int(sizeof(W))>(two.w + lane_offset, words_of[j + 1]);
          }
#pragma unroll
          for (int j = 0; j < Tile::kUnroll; ++j) {
            float weights[kVec];
            widen<W>(words_of[j], weights);
#pragma unroll
            for (int v = 0; v < kVec; ++v) sums[i][v] = __fmaf_rn(factor[j], weights[v], sums[i][v]);
          }
        }
      }
    }
  }

  wait_for_copies<0>();
  __syncthreads();  // stages become sums
#pragma unroll
  for (int i = 0; i < Tile::kTokens; ++i) {
    float* to = &storage.sums[slot + Tile::kSlots * i][(part * 32 + lane) * kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) to[v] = sums[i][v];
  }
  sync_cluster();
  constexpr int kQuads = Tile::kFeatures / 4;
  for (int q = int(cluster_rank()) * Tile::kThreads + threadIdx.x; q < tokens * kQuads;
       q += int(kActiveSlices) * Tile::kThreads) {
    const int64_t token = q / kQuads, column = column0 + q % kQuads * 4;
    if (column >= args.out_features) continue;
    const uint32_t at = shared_address(&storage.sums[0][0]) + q * 16;
    float4 of_slice[kActiveSlices];
#pragma unroll
    for (int s = 0; s < kActiveSlices; ++s) of_slice[s] = load_cluster4(at, s);
    float total[4] = {};
#pragma unroll
    for (int s = 0; s < kActiveSlices; ++s) {
      total[0] = __fadd_rn(total[0], of_slice[s].x);
      total[1] = __fadd_rn(total[1], of_slice[s].y);
      total[2] = __fadd_rn(total[2], of_slice[s].z);
      total[3] = __fadd_rn(total[3], of_slice[s].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= args.out_features) break;
      float v = total[i];
      if (args.scale_w != nullptr) v = __fmul_rn(v, args.scale_w[args.scale_w_per_column ? column + i : 0]);
      if (args.bias != nullptr) v = __fadd_rn(v, load_as(args.bias_dtype, args.bias, column + i));
      store_as(args.out_dtype, args.out, token * args.out_features + column + i, v);
    }
  }
  sync_cluster();  // the others may still read the sums of this block
}

}  // namespace sparse24::cuda
