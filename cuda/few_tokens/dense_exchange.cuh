// How results of a dense product of few tokens leave a block: lanes have eight rows of the weight beside each other,
// which are columns of what is stored, and stores of them alone would be many and narrow.
#pragma once

#include "few_tokens/dense_mainloop.cuh"

namespace sparse24::cuda {

// Where a thread's sums lie: value 4 j + 2 h + e is row `row` + 8 h of the tile and token `token` + 8 j + e.
struct DensePlace {
  int row, token;
  __device__ __forceinline__ DensePlace()
      : row(int(threadIdx.x) / 128 * 64 + int(threadIdx.x) / 32 % 4 * 16 + int(threadIdx.x) % 32 / 4),
        token(int(threadIdx.x) % 4 * 2) {}
};

__device__ __forceinline__ void wait_for_warpgroups(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Stores of(i, token) of all values of all threads of the warpgroups to `to` [tokens, row_size], whose columns from
// `first` to `end` are those of the tile. `shared` has 16 bytes' alignment.
template <class Tile, class Value, class Of>
__device__ __forceinline__ void store_exchanged(Value* to, int row_size, int first, int end, int tokens, int threads,
                                                unsigned char* shared, const Of& of) {
  constexpr int kExchanged = Tile::kExchanged, kBytes = int(sizeof(Value));
  const DensePlace place;
  const int pitch = Tile::exchange_pitch(threads / 128, kBytes);
  const int columns = end - first;
#pragma unroll
  for (int token0 = 0; token0 < Tile::kTokens; token0 += kExchanged) {
    if (token0 >= tokens) break;
#pragma unroll
    for (int i = token0 / 2; i < (token0 + kExchanged) / 2; ++i) {
      const int token = place.token + i / 4 * 8 + i % 2;
      *reinterpret_cast<Value*>(shared + (token - token0) * pitch + (place.row + i / 2 % 2 * 8) * kBytes) =
          of(i, token);
    }
    wait_for_warpgroups(threads);
    const int some = tokens - token0 < kExchanged ? tokens - token0 : kExchanged;
    if (row_size % 8 == 0) {
      using Eight = std::conditional_t<kBytes == 1, uint2, uint4>;
      const int eights = columns / 8;
      for (int i = threadIdx.x; i < some * eights; i += threads) {
        const int token = i / eights, eight = i % eights;
        *reinterpret_cast<Eight*>(to + int64_t{token0 + token} * row_size + first + 8 * eight) =
            *reinterpret_cast<const Eight*>(shared + token * pitch + 8 * eight * kBytes);
      }
    } else {
      for (int i = threadIdx.x; i < some * columns; i += threads) {
        const int token = i / columns, column = i % columns;
        to[int64_t{token0 + token} * row_size + first + column] =
            *reinterpret_cast<const Value*>(shared + token * pitch + column * kBytes);
      }
    }
    wait_for_warpgroups(threads);
  }
}

}  // namespace sparse24::cuda
