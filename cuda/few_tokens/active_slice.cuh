// What a warp of mm_active reads: the activations of its slice of the neurons, and the rows of w that these use.
#pragma once

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/weights.cuh"
#include "sparse24/mm_active.h"

namespace sparse24::cuda {

// kTokens: an even number. kVectors: w can be copied 16 bytes at a time.
template <class W, int kTokens_, bool kVectors_>
struct ActiveTile {
  static constexpr int kTokens = kTokens_;
  static constexpr bool kVectors = kVectors_;
  static constexpr int kOfLane = 8, kColumns = 32 * kOfLane;  // of w
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kResident = kTokens <= 8 ? 2 : 1;  // blocks of a multiprocessor: what leaves registers for sums
  static constexpr int kRowBytes = kColumns * int(sizeof(W));
  static constexpr int kRing = 24576 / kResident / kRowBytes;  // rows of a warp that are there or on the way
  static constexpr int kNeurons = 16;                          // of a step
  static constexpr int kListed = 32;                           // steps whose rows are listed at once
  static constexpr int kPitch = kColumns + 4;                  // of a token's sums, which take the place of the rows
  static constexpr int kSumBytes = kTokens * kPitch * 4;
  static constexpr int kWarpBytes = kRing * kRowBytes > kSumBytes ? kRing* kRowBytes : kSumBytes;
  static constexpr int kListBytes = kNeurons * kListed * 2;
  static constexpr int kSharedBytes = kWarps * (kWarpBytes + kListBytes);

  static_assert(kRing % 4 == 0 && kRing >= kNeurons + 4);
};

// y[tokens][features]: lane 16h + n has neuron n of a step, of the tokens 2j + h.
template <class Y, class Tile>
struct ActiveTokens {
  const uint16_t* y;  // of this lane's first token and neuron
  int64_t features;
  int tokens, left;  // of this lane, from its first ones on; of another warp's neurons there are none

  using Values = uint16_t[Tile::kTokens / 2];
  __device__ __forceinline__ void load(int step, Values& values) const {
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 2; ++j) {
      values[j] = 0;
      if (2 * j < tokens && Tile::kNeurons * step < left) values[j] = y[2 * j * features + Tile::kNeurons * step];
    }
  }
  // Bit 16h + n: whether a token uses a neuron. The same in all lanes.
  __device__ __forceinline__ static uint32_t used(uint16_t value) {
    return __ballot_sync(0xffffffffu, (value & 0x7fffu) != 0);
  }
  __device__ __forceinline__ static uint32_t used_by_any(const Values& values) {
    uint32_t any = 0;
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 2; ++j) any |= used(values[j]);
    return (any | any >> 16) & 0xffffu;
  }
};

// The rows of w that a list names, in a ring in shared memory: row j of the list is in place j % kRing.
template <class W, class Tile>
struct ActiveRows {
  static constexpr int kLanes = Tile::kRowBytes / 16, kRowsOfCopy = 32 / kLanes;
  const char* w;  // of this lane's piece of the row that the list calls 0
  uint32_t row_bytes;
  int bytes;                              // of the strip, from this lane's piece on, that exist
  uint32_t to;                            // this lane's piece of the ring
  int copied = 0, rounds = 0, place = 0;  // rows, and in how many groups of copies; the next place

  // Four rows.
  __device__ __forceinline__ void copy(const uint16_t* list, int listed, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i += kRowsOfCopy) {
      const int row = copied + i + lane / kLanes;
      const bool exists = bytes > 0 && row < listed;
      const char* from = w + uint64_t{row_bytes} * list[min(row, listed - 1)];
      const uint32_t at = to + (place + i) * Tile::kRowBytes;
      if constexpr (Tile::kVectors) {
        copy16_if(exists, at, from);
      } else {
        uint32_t words[4] = {};
        for (int b = 0; b < 16; b += int(sizeof(W))) {
          if (!exists || b >= bytes) break;
          const uint32_t element = sizeof(W) == 2 ? *reinterpret_cast<const uint16_t*>(from + b)
                                                  : *reinterpret_cast<const uint8_t*>(from + b);
          words[b / 4] |= element << (b % 4 * 8);
        }
        store_shared4(at, words);
      }
    }
    commit_copies();
    copied += 4;
    ++rounds;
    place = place + 4 == Tile::kRing ? 0 : place + 4;
  }
  // As many as fit while the rows from `first` on are needed.
  __device__ __forceinline__ void copy_ahead(const uint16_t* list, int listed, int first, int lane) {
    while (copied < listed && copied + 4 <= first + Tile::kRing) copy(list, listed, lane);
  }
  // Until the first `count` rows are there.
  __device__ __forceinline__ void wait(int count) const {
    const int later = rounds - (count + 3) / 4;
    if (later >= 8) {
      wait_for_copies<8>();
    } else if (later >= 6) {
      wait_for_copies<6>();
    } else if (later >= 4) {
      wait_for_copies<4>();
    } else if (later == 3) {
      wait_for_copies<3>();
    } else if (later == 2) {
      wait_for_copies<2>();
    } else if (later == 1) {
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
  }
};

}  // namespace sparse24::cuda
