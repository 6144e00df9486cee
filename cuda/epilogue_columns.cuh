// The scale and the bias of every column of a tile, in shared memory.
//
// Read from global memory inside the loops of an epilogue they cost one latency for every 32 columns, and the two warps
// that share a scheduler there hide little of it. A warpgroup fetches them all at once instead, into a part of its own:
// warpgroups may be at different tiles.
#pragma once

#include "quad.cuh"

namespace sparse24::cuda {

template <int kTileN>
class ColumnTerms {
 public:
  // Of two neighbouring columns: acc * scale + shift.
  struct alignas(16) Two {
    float scale[2];
    float shift[2];
  };

  // This warpgroup's part of the epilogue's shared memory. Consumer warpgroups are neighbours.
  static __device__ __forceinline__ ColumnTerms& of_warpgroup(char* shared) {
    return reinterpret_cast<ColumnTerms*>(shared)[threadIdx.x / 128 % 2];
  }

  // Fetches columns n_tile .. n_tile + kTileN - 1; those from `cols` on are never stored, and take 1 and 0.
  template <class Scale, class Shift>
  __device__ __forceinline__ void fetch(int n_tile, int cols, Scale scale, Shift shift) {
    constexpr int kEach = (kTileN / 2 + 127) / 128;
    Two two[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = n_tile + 2 * (128 * i + threadIdx.x % 128) + c;
        two[i].scale[c] = column < cols ? scale(column) : 1.f;
        two[i].shift[c] = column < cols ? shift(column) : 0.f;
      }
    }
    sync_warpgroup();  // all have read the last tile's
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = 128 * i + threadIdx.x % 128;
      if (at < kTileN / 2) two_[at] = two[i];
    }
    sync_warpgroup();
  }

  // Of columns n and n + 1 of the tile; n is even.
  __device__ __forceinline__ Two operator[](int n) const { return two_[n / 2]; }

 private:
  Two two_[kTileN / 2];
};

// The shared memory of an epilogue: one for each of two consumer warpgroups.
template <int kTileN>
struct ColumnTermsStorage {
  ColumnTerms<kTileN> of_warpgroup[2];
};

}  // namespace sparse24::cuda
