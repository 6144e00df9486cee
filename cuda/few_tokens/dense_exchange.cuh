// How results of the first dense product leave a block: lanes have eight rows of the weight beside each other, which
// are columns of what is stored, and stores of them alone would be many and narrow. stmatrix turns them in shared
// memory.
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

// Matrices of 8 x 8 pairs of bytes, of which a lane has two of row lane / 4 in each: row i goes to what lane 8 m + i
// names for matrix m.
__device__ __forceinline__ void store_rows(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_rows(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}
// Matrices of 8 x 8 pairs of bytes, of which a lane has two of row lane / 4 in each: column i goes to what lane
// 8 m + i names for matrix m.
__device__ __forceinline__ void store_turned(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ void store_turned(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Stores of(j, h) of all threads of the warpgroups, which are the values 4 j + 2 h and the one behind it, to
// `to` [tokens, row_size], whose columns from `first` to `end` are those of the tile: both multiples of eight, as
// row_size is. They have 16 bits, or are codes. `shared` has 16 bytes' alignment.
template <class Tile, class Value, class Of>
__device__ __forceinline__ void store_exchanged(Value* to, int row_size, int first, int end, int tokens, int threads,
                                                unsigned char* shared, const Of& of) {
  constexpr int kBytes = int(sizeof(Value));
  const int pitch = Tile::exchange_pitch(threads / 128, kBytes), lane = int(threadIdx.x) % 32;
  // Of the 16 rows of a warp. Codes: of its rows r and r + 8 in turn.
  const uint32_t of_warp = shared_address(shared) +
                           (threadIdx.x / 32 * 16 + (kBytes == 2 ? lane / 8 % 2 * 8 : 0)) * kBytes +
                           (lane % 8 + (kBytes == 2 ? lane / 16 : lane / 8 % 2) * 8) * pitch;
  const int eights = (end - first) / 8;
#pragma unroll
  for (int j = 0; j < Tile::kTokens / 8; j += 2) {
    const uint32_t at = of_warp + j * 8 * pitch;
    if constexpr (kBytes == 2) {
      store_turned(at, of(j, 0), of(j, 1), of(j + 1, 0), of(j + 1, 1));
    } else {
      store_turned(at, __byte_perm(of(j, 0), of(j, 1), 0x5140), __byte_perm(of(j + 1, 0), of(j + 1, 1), 0x5140));
    }
  }
  wait_for_warpgroups(threads);
  for (int i = threadIdx.x; i < tokens * eights; i += threads) {
    const int token = i / eights, eight = i % eights;
    Value* const out = to + int64_t{token} * row_size + first + 8 * eight;
    if constexpr (kBytes == 2) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(shared + token * pitch + eight * 16);
    } else {
      const uint4 both = *reinterpret_cast<const uint4*>(shared + token * pitch + eight / 2 * 16);
      const uint32_t mine = eight % 2 == 0 ? 0x6420 : 0x7531;
      *reinterpret_cast<uint2*>(out) = make_uint2(__byte_perm(both.x, both.y, mine), __byte_perm(both.z, both.w, mine));
    }
  }
  wait_for_warpgroups(threads);
}

}  // namespace sparse24::cuda
