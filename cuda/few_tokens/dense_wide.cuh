// What is done with the first product of 65 to 128 tokens, whose rows are tokens.
#pragma once

#include "few_tokens/dense_few.cuh"

namespace sparse24::cuda {

// As DenseRelu2.
template <class Tile, class T>
struct WideRelu2 {
  using Params = DenseRelu2Params;
  static constexpr bool kFp8 = sizeof(typename Tile::Element) == 1;
  static constexpr bool kInRing = false;

  const Params& p;
  typename Tile::Shared& shared;  // of tokens: scales of x, and the inverse of those of y; of rows: scales and biases

  __device__ __forceinline__ void prepare(int tokens, int threads) const {
    if constexpr (kFp8) load_token_scales<Tile>(p, shared, tokens, threads);
  }
  __device__ __forceinline__ void begin(int first, int end) const {
    load_row_factors(p.factors, std::is_same_v<T, __half>, shared, first, end);
  }

  __device__ __forceinline__ void finish(const DenseWalk& walk, int unit, int tokens, int threads,
                                         unsigned char* exchange, float (&c)[Tile::kValues]) const {
    const int first = walk.first_row(walk.tile(unit)), end = walk.first_row(walk.tile(unit) + 1);
    const int token = DensePlace().row, column = DensePlace().token;
    wait_for_warpgroups(threads);  // factors of rows are there
    // Of two columns beside each other, of token `token` + 8 h.
    const auto squared = [&](int j, int h) {
      float2 v = make_float2(c[4 * j + 2 * h], c[4 * j + 2 * h + 1]);
      if constexpr (kFp8) {
        const float scale = shared.of_tokens[0][token + 8 * h];
        const float2 of_w = *reinterpret_cast<const float2*>(shared.of_rows[0] + column + 8 * j);
        v = make_float2(__fmul_rn(__fmul_rn(v.x, scale), of_w.x), __fmul_rn(__fmul_rn(v.y, scale), of_w.y));
      }
      if (p.factors.bias != nullptr) {
        const float2 bias = *reinterpret_cast<const float2*>(shared.of_rows[1] + column + 8 * j);
        v = make_float2(__fadd_rn(v.x, bias.x), __fadd_rn(v.y, bias.y));
      }
      return squares_above(T{}, p.threshold, v);
    };
    if (kFp8 && p.factors.scale_y != nullptr) {
      store<uint8_t>(walk.rows, first, end, tokens, threads, exchange, [&](int j, int h) {
        const float2 v = squared(j, h);
        const float inverse = shared.of_tokens[1][token + 8 * h];
        return uint32_t(to_e4m3x2(__fmul_rn(v.x, inverse), __fmul_rn(v.y, inverse)));
      });
    } else {
      store<uint16_t>(walk.rows, first, end, tokens, threads, exchange, [&](int j, int h) {
        const float2 v = squared(j, h);
        return pack2(T{}, v.x, v.y);
      });
    }
  }

 private:
  // Stores of(j, h), which are columns 8 j of each lane and the one behind it of token h, through shared memory.
  template <class Value, class Of>
  __device__ __forceinline__ void store(int row_size, int first, int end, int tokens, int threads,
                                        unsigned char* exchange, const Of& of) const {
    constexpr int kBytes = int(sizeof(Value)), kPitch = Tile::exchange_pitch(kBytes);
    const int lane = int(threadIdx.x) % 32;
    // Codes: 16 columns in 16 bytes, those of two eights in turn by pairs.
    const uint32_t of_warp = shared_address(exchange) + (threadIdx.x / 32 * 16 + lane / 8 % 2 * 8 + lane % 8) * kPitch +
                             (kBytes == 2 ? lane / 16 * 16 : 0);
#pragma unroll
    for (int j = 0; j < Tile::kRows / 8; j += 2) {
      const uint32_t at = of_warp + j * 8 * kBytes;
      if constexpr (kBytes == 2) {
        store_rows(at, of(j, 0), of(j, 1), of(j + 1, 0), of(j + 1, 1));
      } else {
        store_rows(at, of(j, 0) | of(j + 1, 0) << 16, of(j, 1) | of(j + 1, 1) << 16);
      }
    }
    wait_for_warpgroups(threads);
    const int eights = (end - first) / 8;
    for (int i = threadIdx.x; i < tokens * eights; i += threads) {
      const int of_token = i / eights, eight = i % eights;
      Value* const out = static_cast<Value*>(p.y) + int64_t{of_token} * row_size + first + 8 * eight;
      if constexpr (kBytes == 2) {
        *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(exchange + of_token * kPitch + eight * 16);
      } else {
        const uint4 both = *reinterpret_cast<const uint4*>(exchange + of_token * kPitch + eight / 2 * 16);
        const uint32_t mine = eight % 2 == 0 ? 0x5410 : 0x7632;
        *reinterpret_cast<uint2*>(out) =
            make_uint2(__byte_perm(both.x, both.y, mine), __byte_perm(both.z, both.w, mine));
      }
    }
    wait_for_warpgroups(threads);
  }
};

}  // namespace sparse24::cuda
