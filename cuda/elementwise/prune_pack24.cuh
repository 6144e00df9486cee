// prune_pack24: one pass over a weight, which writes it pruned and as a sparse operand.
//
// Types of 8, 16 and 32 bits are compared as integers: the bits of a magnitude, with one code for NaN, the largest.
#pragma once

#include "common/packed.cuh"
#include "sparse24/packed.h"

namespace sparse24::cuda {

// A float8_e4m3fn code.
struct E4M3Code {
  uint8_t bits;
};

template <class T>
struct Magnitude {
  static constexpr uint32_t kMask = 0x7fff, kInfinity = 0x7c00;
};
template <>
struct Magnitude<__nv_bfloat16> {
  static constexpr uint32_t kMask = 0x7fff, kInfinity = 0x7f80;
};
template <>
struct Magnitude<float> {
  static constexpr uint32_t kMask = 0x7fffffff, kInfinity = 0x7f800000;
};
template <>
struct Magnitude<E4M3Code> {
  static constexpr uint32_t kMask = 0x7f, kInfinity = 0x7f;  // it has one NaN, and no infinity
};

// N neighbouring elements.
template <class T, int N>
struct Elements {
  static constexpr int kWords = N * sizeof(T) / 4, kPerWord = 4 / sizeof(T);
  uint32_t w[kWords];

  __device__ __forceinline__ static Elements load(const T* p, bool valid) {
    Elements e{};
    if (!valid) return e;
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const Vec8 v = load16(reinterpret_cast<const uint32_t*>(p) + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) e.w[i + j] = v.w[j];
    }
    return e;
  }
  __device__ __forceinline__ uint32_t operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return w[i];
    } else {
      return w[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T)) & ((1u << (8 * sizeof(T))) - 1);
    }
  }
  __device__ __forceinline__ void add(int i, uint32_t bits) {
    w[i / kPerWord] |= bits << (i % kPerWord * 8 * sizeof(T));
  }
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(p) = make_uint2(w[0], w[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        store16(reinterpret_cast<uint32_t*>(p) + i, w[i], w[i + 1], w[i + 2], w[i + 3]);
    }
  }
};

// Which two of a group stay, and what they are.
struct KeptOfFour {
  uint32_t out[4];  // zeros where nothing is kept
  uint32_t first, second, first_place, second_place;

  __device__ __forceinline__ uint32_t nibble() const { return first_place | second_place << 2; }
};

// Tells of each of four magnitudes whether it is one of the two largest; of equals the lower position is.
template <class In>
__device__ __forceinline__ void two_largest(const uint32_t (&bits)[4], bool (&keep)[4]) {
  using M = Magnitude<In>;
  if constexpr (sizeof(In) <= 2) {
    // The position is a part of the key, so that no two are equal, and both stay that reach the second largest.
    uint32_t key[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      key[i] = min((bits[i] << 2 & M::kMask << 2) | (3 - i), (M::kInfinity + 1) << 2 | (3 - i));
    const uint32_t second =
        max(min(max(key[0], key[1]), max(key[2], key[3])), max(min(key[0], key[1]), min(key[2], key[3])));
#pragma unroll
    for (int i = 0; i < 4; ++i) keep[i] = key[i] >= second;
  } else {
    uint32_t key[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t magnitude = bits[i] & M::kMask;
      key[i] = magnitude > M::kInfinity ? M::kMask : magnitude;
    }
    // An element stays if it beats two of the three others.
    const auto two_of = [](bool a, bool b, bool c) { return (a && (b || c)) || (b && c); };
    const bool b01 = key[0] >= key[1], b02 = key[0] >= key[2], b03 = key[0] >= key[3];
    const bool b12 = key[1] >= key[2], b13 = key[1] >= key[3], b23 = key[2] >= key[3];
    keep[0] = two_of(b01, b02, b03);
    keep[1] = two_of(!b01, b12, b13);
    keep[2] = two_of(!b02, !b12, b23);
    keep[3] = two_of(!b03, !b13, !b23);
  }
}

// Chooses of four elements, given as bits, and converts them.
template <class In, class Out>
__device__ __forceinline__ KeptOfFour keep_of_four(const uint32_t (&bits)[4]) {
  bool keep[4];
  two_largest<In>(bits, keep);
  KeptOfFour kept;
  uint32_t value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = bits[i];
    if constexpr (sizeof(In) > sizeof(Out)) value[i] = pack2(Out{}, __uint_as_float(bits[i]), 0.f) & 0xffff;
    kept.out[i] = keep[i] ? value[i] : 0;
  }
  kept.first = keep[0] ? value[0] : keep[1] ? value[1] : value[2];
  kept.second = keep[3] ? value[3] : keep[2] ? value[2] : value[1];
  kept.first_place = keep[0] ? 0 : keep[1] ? 1 : 2;
  kept.second_place = keep[3] ? 3 : keep[2] ? 2 : 1;
  return kept;
}

inline constexpr int kPackThreads = 256;
inline constexpr int kPackRows = 16, kPackColumns = 512;  // of a CTA of prune_pack_features, one warp wide

// Groups along the columns of w [features, cols]. A lane has 16 columns of a row of the operand, and a warp two rows,
// which are neighbouring features.
template <class In, class Out>
__global__ void __launch_bounds__(kPackThreads) prune_pack_features(const In* w, int64_t cols, Operand a, Out* pruned,
                                                                    Out* values, uint8_t* meta, int column_blocks) {
  __shared__ alignas(16) uint16_t tile[kPackColumns / 64][64 + 8];  // as in compress_features_16bit
  const int64_t row_group = blockIdx.x / column_blocks;
  const int64_t col0 = int64_t(blockIdx.x % column_blocks) * kPackColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t col = col0 + 16 * lane;
  const bool valid = row_group * kPackRows < a.m && col < cols;

  Elements<In, 16> in[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t feature = packed_feature(row_group * kPackRows + 8 * i + warp);
    in[i] = Elements<In, 16>::load(w + feature * cols + col, valid);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = row_group * kPackRows + 8 * i + warp, feature = packed_feature(row);
    Elements<Out, 16> dense{};
    Elements<Out, 8> packed{};
    uint32_t nibbles = 0;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const uint32_t bits[4] = {in[i][4 * g], in[i][4 * g + 1], in[i][4 * g + 2], in[i][4 * g + 3]};
      const KeptOfFour kept = keep_of_four<In, Out>(bits);
#pragma unroll
      for (int j = 0; j < 4; ++j) dense.add(4 * g + j, kept.out[j]);
      packed.add(2 * g, kept.first);
      packed.add(2 * g + 1, kept.second);
      nibbles |= kept.nibble() << (4 * g);
    }
    if (valid) {
      dense.store(pruned + feature * cols + col);
      packed.store(values + (row * cols + col) / 2);
    }
    if constexpr (sizeof(Out) == 2) {
      tile[lane / 4][(lane % 2) * 32 + warp * 4 + (lane / 2 % 2) * 2 + i] = uint16_t(nibbles);
    } else if (col < a.k_meta) {
      *reinterpret_cast<uint16_t*>(meta + (col / 128 * a.m_meta + row) * 16 + col % 128 / 8) = uint16_t(nibbles);
    }
  }
  if constexpr (sizeof(Out) == 2) {
    __syncthreads();
    const int block = threadIdx.x / 8, piece = threadIdx.x % 8;
    if (block < kPackColumns / 64 && col0 + 64 * block < a.k_meta) {
      uint8_t* out = meta + (col0 / 64 + block) * a.m_meta * 8 + row_group * 128;
      reinterpret_cast<uint4*>(out)[piece] = reinterpret_cast<const uint4*>(tile[block])[piece];
    }
  }
}

inline constexpr int kPackDepth = 128, kPackFeatures = 64;  // of a CTA of prune_pack_transposed

// Groups along the rows of w [depth, cols], whose columns are the features and turn in shared memory. A thread has a
// group of eight features.
template <class In, class Out>
__global__ void __launch_bounds__(kPackThreads) prune_pack_transposed(const In* w, int64_t cols, Operand a, Out* pruned,
                                                                      Out* values, uint8_t* meta, int feature_blocks) {
  constexpr int kGroups = kPackDepth / 4;
  __shared__ uint32_t pairs[kPackFeatures][kGroups + 1];  // the two that a group keeps; padded against bank conflicts
  __shared__ uint8_t nibbles[kPackFeatures][kGroups + 4];
  const int64_t k0 = int64_t(blockIdx.x / feature_blocks) * kPackDepth;
  const int64_t feature0 = int64_t(blockIdx.x % feature_blocks) * kPackFeatures;
  {
    const int g = threadIdx.x / 8, place = threadIdx.x % 8 * 8;
    const bool valid = k0 + 4 * g < a.k && feature0 + place < a.m;
    const int64_t at = (k0 + 4 * g) * cols + feature0 + place;
    Elements<In, 8> in[4];
    Elements<Out, 8> dense[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) in[i] = Elements<In, 8>::load(w + at + i * cols, valid);
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const uint32_t bits[4] = {in[0][f], in[1][f], in[2][f], in[3][f]};
      const KeptOfFour kept = keep_of_four<In, Out>(bits);
#pragma unroll
      for (int i = 0; i < 4; ++i) dense[i].add(f, kept.out[i]);
      pairs[place + f][g] = kept.first | kept.second << 16;
      nibbles[place + f][g] = uint8_t(kept.nibble());
    }
    if (valid) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dense[i].store(pruned + at + i * cols);
    }
  }
  __syncthreads();

  constexpr int kPieces = kGroups / 4;  // of 16 bytes
  for (int i = threadIdx.x; i < kPackFeatures * kPieces; i += kPackThreads) {
    const int f = i / kPieces, piece = i % kPieces;
    const uint32_t* p = &pairs[f][4 * piece];
    if (feature0 + f < a.m && k0 + 16 * piece < a.k)
      store16(values + ((feature0 + f) * a.k + k0) / 2 + 8 * piece, p[0], p[1], p[2], p[3]);
  }
  // A thread has the word of the metadata with 16 columns of rows r and r + 8: format.h draws it.
  const int block = threadIdx.x / 128, rows = threadIdx.x / 32 % 4, word = threadIdx.x % 32;
  const int first_group = 16 * block + 4 * (word / 16 + word % 2 * 2);
  const auto half = [&](int row) {
    uint32_t four = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) four |= uint32_t(nibbles[16 * rows + row][first_group + i]) << (4 * i);
    return four;
  };
  const int row = word / 2 % 8;
  if (k0 + 64 * block < a.k_meta) {
    uint8_t* out = meta + (k0 / 64 + block) * a.m_meta * 8 + (feature0 / 16 + rows) * 128;
    reinterpret_cast<uint32_t*>(out)[word] = half(row) | half(row + 8) << 16;
  }
}

}  // namespace sparse24::cuda
