// The rows of w that tokens use, as a warp reads and adds them up.
#pragma once

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// A block has half of the columns of a strip of w, and takes the neurons of a slice: half of its warps the even ones,
// the other half the odd ones. kTokens: 2, 4 or 8. kVectors: w can be copied eight columns at a time.
template <class W, int kTokens_, bool kVectors_, int kStages_, int kStageBytes_ = 4096>
struct ActiveTile {
  static constexpr int kTokens = kTokens_, kStages = kStages_, kStageBytes = kStageBytes_;  // of a warp
  static constexpr bool kVectors = kVectors_;
  static constexpr int kWarps = 16, kThreads = 32 * kWarps, kColumnWarps = kWarps / 2;
  static constexpr int kOfLane = 8, kWarpColumns = 32 * kOfLane, kColumns = kColumnWarps * kWarpColumns;  // of a block
  static constexpr int kPieceBytes = kOfLane * int(sizeof(W)), kRowBytes = 32 * kPieceBytes;              // of a warp
  static constexpr int kStageRows = kStageBytes / kRowBytes;
  static constexpr int kRingBytes = kWarps * kStages * kStageBytes;
  static constexpr int kSumBytes = kTokens * kColumns * 4;  // in the place of the rings
  static constexpr int kNeurons = 1024;                     // of a slice whose y is in shared memory at once: even

  static_assert(kSumBytes <= kRingBytes && kStageRows < 32 && kStages <= 6);
  static constexpr int activation_bytes(int neurons) { return 2 * kTokens * neurons; }
};

// The columns of a block in one of the strips that w is divided into.
struct ActiveColumns {
  int strips, first, count;

  // Strips of two blocks, as equal as whole pieces of eight columns allow.
  template <class Tile>
  __device__ __forceinline__ static ActiveColumns of(int64_t out_features, int strip, int rank) {
    const int columns = int(out_features), strips = (columns + 2 * Tile::kColumns - 1) / (2 * Tile::kColumns);
    const int halves = 2 * strips, of_half = ((columns + halves - 1) / halves + 7) / 8 * 8;
    const int first = (2 * strip + rank) * of_half;
    return {strips, first, max(0, min(of_half, columns - first))};
  }
};

// Goes through the neurons of a warp that some token uses, in ascending order.
struct UsedNeurons {
  int base = 0, next = 0;  // 64 neurons, of which a lane has one, and those behind them
  uint32_t used = 0;       // that are left
};

template <class Y, class W, class Tile>
struct ActiveRows {
  static constexpr int kTokens = Tile::kTokens;
  const char* w;  // of the first neuron, and this lane's columns
  int64_t row_bytes;
  int columns;           // of this lane that exist: zero or less, or up to eight
  uint32_t activations;  // [neurons][kTokens] in shared memory
  uint32_t ring;         // of the warp
  int parity;            // of its neurons
  int known = 0;         // neurons whose y is there; even, or all
  UsedNeurons copying, adding;
  uint32_t counts = 0;  // five bits for each stage: its rows

  __device__ __forceinline__ static ActiveRows of(const MmActiveArgs& args, int neuron0, ActiveColumns columns,
                                                  uint32_t activations, uint32_t rings) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = warp % Tile::kColumnWarps * Tile::kWarpColumns + lane * Tile::kOfLane;
    const int64_t row_bytes = args.out_features * int64_t{sizeof(W)};
    const char* w = static_cast<const char*>(args.w) + neuron0 * row_bytes + (columns.first + column) * int(sizeof(W));
    const uint32_t ring = rings + warp * Tile::kStages * Tile::kStageBytes;
    return {w, row_bytes, columns.count - column, activations, ring, warp / Tile::kColumnWarps};
  }

  using Values = uint32_t[kTokens / 2];
  __device__ __forceinline__ void load(int neuron, Values& values) const {
    const uint32_t at = activations + neuron * kTokens * 2;
    if constexpr (kTokens == 2) {
      values[0] = load_shared1(at);
    } else if constexpr (kTokens == 4) {
      const uint2 v = load_shared2(at);
      values[0] = v.x;
      values[1] = v.y;
    } else {
      const uint4 v = load_shared4(at);
      values[0] = v.x;
      values[1] = v.y;
      values[2] = v.z;
      values[3] = v.w;
    }
  }
  // The next one, or a negative number where none is known.
  __device__ __forceinline__ int next(UsedNeurons& of) const {
    while (of.used == 0) {
      if (of.next >= known) return -1;
      of.base = of.next;
      of.next = min(of.base + 64, known);
      const int neuron = of.base + 2 * int(threadIdx.x % 32) + parity;
      uint32_t any = 0;
      if (neuron < known) {
        Values values;
        load(neuron, values);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) any |= values[i];
      }
      of.used = __ballot_sync(0xffffffffu, (any & 0x7fff7fffu) != 0);
    }
    const int neuron = of.base + 2 * (__ffs(int(of.used)) - 1) + parity;
    of.used &= of.used - 1;
    return neuron;
  }

  // As many rows as are known and fit, as one group of copies.
  __device__ __forceinline__ void copy(int stage) {
    int count = 0;
    for (; count < Tile::kStageRows; ++count) {
      const int neuron = next(copying);
      if (neuron < 0) break;
      copy_piece(place(stage, count) + threadIdx.x % 32 * Tile::kPieceBytes, w + neuron * row_bytes);
    }
    commit_copies();
    counts = (counts & ~(31u << 5 * stage)) | uint32_t(count) << 5 * stage;
  }
  __device__ __forceinline__ uint32_t place(int stage, int row) const {
    return ring + stage * Tile::kStageBytes + row * Tile::kRowBytes;
  }
  __device__ __forceinline__ int count(int stage) const { return int(counts >> 5 * stage & 31u); }
  __device__ __forceinline__ void copy_piece(uint32_t to, const char* from) const {
    if constexpr (Tile::kVectors && sizeof(W) == 2) {
      copy16_if(columns > 0, to, from);
    } else if constexpr (Tile::kVectors) {
      copy8_if(columns > 0, to, from);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int i = 0; i < Tile::kOfLane; ++i) {
        if (i >= columns) continue;
        const uint32_t element =
            sizeof(W) == 2 ? reinterpret_cast<const uint16_t*>(from)[i] : reinterpret_cast<const uint8_t*>(from)[i];
        words[i * int(sizeof(W)) / 4] |= element << i * int(sizeof(W)) % 4 * 8;
      }
      store_shared2(to, words[0], words[1]);
      if constexpr (sizeof(W) == 2) store_shared2(to + 8, words[2], words[3]);
    }
  }

  // What a lane multiplies: a row at the columns 4 lane .. 4 lane + 3 of 128, and of the 128 behind them; and its y.
  struct Row {
    Values values;
    uint32_t words[2 * int(sizeof(W))];
  };
  __device__ __forceinline__ void load(int stage, int i, Row& row) {
    load(next(adding), row.values);
    const uint32_t at = place(stage, i) + threadIdx.x % 32 * (Tile::kPieceBytes / 2);
    if constexpr (sizeof(W) == 2) {
      const uint2 v = load_shared2(at), u = load_shared2(at + Tile::kRowBytes / 2);
      row.words[0] = v.x;
      row.words[1] = v.y;
      row.words[2] = u.x;
      row.words[3] = u.y;
    } else {
      row.words[0] = load_shared1(at);
      row.words[1] = load_shared1(at + Tile::kRowBytes / 2);
    }
  }
  // The products of the rows of a stage, of which the next one is loaded while one is multiplied.
  __device__ __forceinline__ void add(int stage, float (&c)[kTokens][8]) {
    const int rows = count(stage);
    if (rows == 0) return;
    Row row;
    load(stage, 0, row);
    for (int i = 1; i <= rows; ++i) {
      const Row now = row;
      if (i < rows) load(stage, i, row);
      float of_column[8];
      widen<W>(now.words, of_column);
#pragma unroll
      for (int pair = 0; pair < kTokens / 2; ++pair) {
        if ((now.values[pair] & 0x7fff7fffu) == 0) continue;  // the same in all lanes
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint16_t value = uint16_t(now.values[pair] >> 16 * half);
          if ((value & 0x7fffu) == 0) continue;
          const float factor = to_float(Y{}, value);
          float (&sums)[8] = c[2 * pair + half];
#pragma unroll
          for (int v = 0; v < 8; ++v) sums[v] = __fmaf_rn(factor, of_column[v], sums[v]);
        }
      }
    }
  }

  // All rows, the ring's stages from `stage` on; what is there already, and then the rest.
  __device__ __forceinline__ void add_all(int stage, float (&c)[kTokens][8]) {
    const auto after = [](int s) { return s + 1 == Tile::kStages ? 0 : s + 1; };
    // Stages that were left empty, as nothing was known, are filled first.
    int empty = 0;
    for (int s = stage, i = 0; i < Tile::kStages; ++i, s = after(s)) empty = count(s) == 0 ? empty + 1 : 0;
    int fill = stage;
    for (int i = 0; i < Tile::kStages; ++i, fill = after(fill)) {
      if (i >= Tile::kStages - empty) copy(fill);
    }
    for (int idle = 0; idle < Tile::kStages; stage = after(stage)) {
      idle = count(stage) == 0 ? idle + 1 : 0;
      wait_for_copies<Tile::kStages - 1>();
      __syncwarp();
      add(stage, c);
      __syncwarp();
      copy(stage);
    }
  }
};

}  // namespace sparse24::cuda
