// compress along tokens (dim = -2): X [R, C] row-major to the values and metadata of A = X.T, M = C, K = R.
//
// A thread owns 16 tokens x 8 features, so that it loads 16 bytes of each token. Tokens from R to the padding read as
// zeros, which compress to zeros and the padding nibble; so do features from C to the padding of M.
#pragma once

#include "common/packed.cuh"
#include "sparse24/format.h"
#include "sparse24/quantize.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

inline constexpr int kTokenThreads = 256;
inline constexpr int kTokensOfThread = 16;
inline constexpr int kFeaturesOfThread = 8;

// A group of four tokens, of 8 features.
struct TokenGroup {
  Vec8 token[4];

  template <class A>
  __device__ __forceinline__ static TokenGroup load(const A& activation, const void* x, int64_t rows, int64_t cols,
                                                    int64_t row, int64_t col) {
    TokenGroup t{};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (row + i < rows && col < cols)
        t.token[i] = activation.load(static_cast<const char*>(x) + 2 * ((row + i) * cols + col));
    }
    return t;
  }
  template <class A>
  __device__ __forceinline__ Group<A> feature(const A& activation, int f) const {
    const int word = f / 2, half = f % 2 ? 0x7632 : 0x5410;
    return {activation, __byte_perm(token[0].w[word], token[1].w[word], half),
            __byte_perm(token[2].w[word], token[3].w[word], half)};
  }
};

inline constexpr int kTokens16 = 64;     // one metadata atom
inline constexpr int kFeatures16 = 512;  // 64 lanes of 8

// Compresses to 16-bit values [up(R,4)/2, C], with pairs of tokens outermost, because A is MN-major. A CTA has 64
// tokens x 512 features.
template <class A>
__global__ void __launch_bounds__(kTokenThreads)
    compress_tokens_16bit(const typename A::T* x, int64_t rows, int64_t cols, Operand a, typename A::T* values,
                          uint8_t* meta, int feature_blocks, A activation) {
  // 16 features have the 128 bytes that format.h draws, and 16 bytes of padding against bank conflicts.
  __shared__ alignas(16) uint8_t tile[kFeatures16 / 16][128 + 16];
  const int64_t token0 = int64_t(blockIdx.x / feature_blocks) * kTokens16;
  const int64_t feature0 = int64_t(blockIdx.x % feature_blocks) * kFeatures16;
  const int lane = threadIdx.x % 64, quarter = threadIdx.x / 64;
  const int64_t col = feature0 + kFeaturesOfThread * lane;
  const int64_t row0 = token0 + kTokensOfThread * quarter;

  uint32_t complements[kFeaturesOfThread] = {};
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const int64_t row = row0 + 4 * g;
    const TokenGroup tokens = TokenGroup::load(activation, x, rows, cols, row, col);
    uint32_t kept[kFeaturesOfThread];
#pragma unroll
    for (int f = 0; f < kFeaturesOfThread; ++f) {
      const auto group = tokens.feature(activation, f);
      kept[f] = group.kept_16bit();
      complements[f] += group.kept.complement << (4 * g);
    }
    if (row < a.k_values && col < cols) {
      auto* out = values + row / 2 * cols + col;  // of the first kept token; the second has the row below
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = __byte_perm(kept[2 * i], kept[2 * i + 1], second ? 0x7632 : 0x5410);
        store16(out + second * cols, w[0], w[1], w[2], w[3]);
      }
    }
  }
#pragma unroll
  for (int f = 0; f < kFeaturesOfThread; ++f) {
    const int byte = (quarter % 2) * 64 + f * 8 + (quarter / 2) * 4 + (lane % 2) * 2;
    *reinterpret_cast<uint16_t*>(&tile[lane / 2][byte]) = uint16_t(0xffff - complements[f]);
  }
  __syncthreads();
  const int block = threadIdx.x / 8, piece = threadIdx.x % 8;
  if (feature0 + 16 * block < a.m_meta) {
    uint8_t* out = meta + token0 / 64 * a.m_meta * 8 + (feature0 / 16 + block) * 128;
    reinterpret_cast<uint4*>(out)[piece] = reinterpret_cast<const uint4*>(tile[block])[piece];
  }
}

inline constexpr int kTokens8 = 128;    // one metadata atom
inline constexpr int kFeatures8 = 256;  // 32 lanes of 8

// Compresses to fp8 values [C, up(R,32)/2], which turn in shared memory, because fp8 operands are K-major. A CTA has
// 128 tokens x 256 features. There is a scale per feature (stride 1) or one for all (stride 0).
template <class A>
__global__ void __launch_bounds__(kTokenThreads)
    compress_tokens_fp8(const typename A::T* x, int64_t rows, int64_t cols, Operand a, uint8_t* values, uint8_t* meta,
                        const float* scale, int scale_stride, int feature_blocks, A activation) {
  // A feature has 64 kept values in eight chunks of 8 bytes; chunk c lies at c ^ (feature / 8 % 8), against bank
  // conflicts.
  __shared__ alignas(16) uint2 tile[kFeatures8][8];
  // A feature has 16 bytes of metadata; 4 bytes of padding follow every 8 features, against bank conflicts.
  __shared__ uint32_t meta_tile[kFeatures8 / 8][8 * 4 + 1];

  const int64_t token0 = int64_t(blockIdx.x / feature_blocks) * kTokens8;
  const int64_t feature0 = int64_t(blockIdx.x % feature_blocks) * kFeatures8;
  const int lane = threadIdx.x % 32, chunk = threadIdx.x / 32;
  const int64_t col = feature0 + kFeaturesOfThread * lane;
  const int64_t row0 = token0 + kTokensOfThread * chunk;

  float inverse[kFeaturesOfThread];
#pragma unroll
  for (int f = 0; f < kFeaturesOfThread; ++f)
    inverse[f] = col < cols ? __frcp_rn(usable_scale(scale[(col + f) * scale_stride])) : 1.f;

  uint32_t complements[kFeaturesOfThread] = {};
  uint32_t kept[kFeaturesOfThread][2] = {};
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    const TokenGroup tokens = TokenGroup::load(activation, x, rows, cols, row0 + 4 * g, col);
#pragma unroll
    for (int f = 0; f < kFeaturesOfThread; ++f) {
      const auto group = tokens.feature(activation, f);
      kept[f][g / 2] |= uint32_t(group.kept_e4m3(inverse[f])) << (16 * (g % 2));
      complements[f] += group.kept.complement << (4 * g);
    }
  }
#pragma unroll
  for (int f = 0; f < kFeaturesOfThread; ++f) {
    tile[kFeaturesOfThread * lane + f][chunk ^ (lane % 8)] = make_uint2(kept[f][0], kept[f][1]);
    reinterpret_cast<uint16_t*>(&meta_tile[lane][4 * f])[chunk] = uint16_t(0xffff - complements[f]);
  }
  __syncthreads();

  const int64_t pitch = a.k_values / 2;
  for (int i = threadIdx.x; i < kFeatures8 * 4; i += kTokenThreads) {  // chunks 2p and 2p + 1 are 16 bytes
    const int feature = i / 4, p = i % 4, swizzle = feature / 8 % 8;
    const uint2 lo = tile[feature][(2 * p) ^ swizzle], hi = tile[feature][(2 * p + 1) ^ swizzle];
    const int64_t byte = token0 / 2 + 16 * p;
    if (feature0 + feature < cols && byte < pitch) {
      store16(values + (feature0 + feature) * pitch + byte, lo.x, lo.y, hi.x, hi.y);
    }
  }
  for (int feature = threadIdx.x; feature < kFeatures8; feature += kTokenThreads) {
    if (feature0 + feature < a.m_meta) {
      const uint32_t* w = &meta_tile[feature / 8][feature % 8 * 4];
      store16(meta + (token0 / 128 * a.m_meta + feature0 + feature) * 16, w[0], w[1], w[2], w[3]);
    }
  }
}

}  // namespace sparse24::cuda
