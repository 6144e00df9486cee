// The epilogue of linear_relu2_gradient_fp8: dh = dy * 2 sqrt(y), y dense, all of it float8, and both y and dh
// transposed.
//
// Rows, columns and the exchange of features for tokens are those of epilogues/gradient.cuh: after it a lane has four
// features of two tokens, a word of codes. Exchanged back, with two blocks a word, it has two features of each block of
// four tokens, and a transpose of 4 x 4 bytes makes words of four tokens: the eight lanes with a feature write a
// sector.
#pragma once

#include "gemm/sm90/epilogues/derivative_fp8.cuh"
#include "gemm/sm90/epilogues/tokens.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct Relu2GradientFp8Params {
  int tokens, features;
  const uint8_t* y;
  uint8_t* dh;
  uint8_t *y_transposed, *dh_transposed;  // [features, round_up(tokens, 32)]
  DerivativeFp8 derivative;
};

template <int kTileM, int kTileN>
class Relu2GradientFp8Epilogue : public EpilogueBase<Relu2GradientFp8Params, NoStorage> {
  using Base = EpilogueBase<Relu2GradientFp8Params, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma const&, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(kTileM == 4 * kTileGroups && kTileN % TradedPart::kColumns == 0, "whole parts");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    constexpr int kParts = kTileN / TradedPart::kColumns;
    const int lane = lane_of_tile();
    const int group = get<0>(block_coord) * kTileGroups + thread_idx / 32 * 8 + lane / 4;
    const int n = get<1>(block_coord) * kTileN;
    TradedPart parts[kParts];
    round_accumulators(acc, parts);
    const int token = 4 * group + 2 * (lane & 1);  // the first of two
    Codes next;
    load(token, n, lane, next);
    DerivativeFp8::Seen seen = p_.derivative.begin();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts; ++i) trade_features_for_tokens(parts[i].of, lane);
    // A loop, with the next part moved to where the code expects it: unrolled, a tile would fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int feature = n + part * TradedPart::kColumns;
      Codes y, dh;
      arrange(next, y, lane);
      differentiate(parts[0].of, y, token, feature, dh, seen);
      if (part + 1 < kParts) load(token, feature + TradedPart::kColumns, lane, next);
      store_transposed(p_.y_transposed, y, group, feature, lane);
      store_transposed(p_.dh_transposed, dh, group, feature, lane);
      store(dh, token, feature, lane);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 1; i < kParts; ++i) parts[i - 1] = parts[i];
    }
    p_.derivative.collect(seen, lane);
  }

 private:
  static constexpr int kBlocks = TradedPart::kBlocks;

  // Of two tokens: as they lie in memory, 32 bytes of each, both groups of four blocks; or, arranged, one group of all
  // blocks. Lanes that differ in bit 1 have the same tokens.
  using Codes = uint32_t[2][kBlocks];

  CUTLASS_DEVICE static void exchange(Codes& w, bool high) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; i += 2)
      transpose_pair<2>(w[i / kBlocks][i % kBlocks], w[i / kBlocks][i % kBlocks + 1], high);
  }
  // Word 2 b + j is group j of block b of four; afterwards block b + 4 j of eight.
  CUTLASS_DEVICE static void arrange(Codes const& memory, Codes& blocks, int lane) {
    Codes w;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) w[i / kBlocks][i % kBlocks] = memory[i / kBlocks][i % kBlocks];
    exchange(w, lane >> 1 & 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int s = i / kBlocks, j = i % kBlocks;
      blocks[s][j / 2 + 4 * (j % 2)] = w[s][j];
    }
  }

  CUTLASS_DEVICE int64_t index(int token, int feature, int lane) const {
    return int64_t(token) * p_.features + feature + 32 * (lane >> 1 & 1);
  }
  // Those 16 bytes exist.
  CUTLASS_DEVICE bool exists(int token, int feature, int lane) const {
    return token < p_.tokens && feature + 32 * (lane >> 1 & 1) < p_.features;
  }

  // Zeros beyond the last row and column. Not load16: the kernel may have started while the one before it was writing
  // these, so they are not read-only to it.
  CUTLASS_DEVICE void load(int token, int feature, int lane, Codes& out) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = i / 2, half = i % 2;
      uint4 w{};
      if (exists(token + s, feature + 16 * half, lane))
        w = *reinterpret_cast<const uint4*>(p_.y + index(token + s, feature + 16 * half, lane));
      out[s][4 * half] = w.x, out[s][4 * half + 1] = w.y, out[s][4 * half + 2] = w.z, out[s][4 * half + 3] = w.w;
    }
  }

  // Features 0 and 1, 2 and 3 of both tokens, of dy and of y. Beyond the last row and column y is zero, and dy whatever
  // was multiplied.
  CUTLASS_DEVICE static void block(uint32_t const (&dy)[4], Codes const& y, uint32_t const (&mask)[2], int b,
                                   uint32_t (&of_dy)[4], uint16_t (&of_y)[4]) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = i / 2, j = i % 2;
      of_dy[i] = dy[s + 2 * j] & mask[s];
      of_y[i] = uint16_t(y[s][b] >> 16 * j);
    }
  }

  CUTLASS_DEVICE void differentiate(uint32_t const (&dy)[kBlocks][4], Codes const& y, int token, int feature, Codes& dh,
                                    DerivativeFp8::Seen& seen) const {
    uint32_t of_dy[4], mask[2];
    uint16_t of_y[4], codes[4];
    float largest = 0.f;
    const auto mask_of = [&](int b) {
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) mask[s] = token + s < p_.tokens && feature + 8 * b < p_.features ? ~0u : 0u;
    };
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      mask_of(b);
      block(dy[b], y, mask, b, of_dy, of_y);
      DerivativeFp8::apply(of_dy, of_y, codes, seen.to_code, largest);
      dh[0][b] = pack16(codes[0], codes[1]);
      dh[1][b] = pack16(codes[2], codes[3]);
    }
    seen.largest = fmaxf(seen.largest, largest);
    if (__builtin_expect(DerivativeFp8::exceeds(largest, seen.to_code), false)) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kBlocks; ++b) {
        mask_of(b);
        block(dy[b], y, mask, b, of_dy, of_y);
        seen.saturated += DerivativeFp8::saturated_of(of_dy, of_y, seen.to_code);
      }
    }
  }

  // Where `load` found y.
  CUTLASS_DEVICE void store(Codes const& dh, int token, int feature, int lane) const {
    Codes w;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int s = i / kBlocks, j = i % kBlocks;
      w[s][j] = dh[s][j / 2 + 4 * (j % 2)];
    }
    exchange(w, lane >> 1 & 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = i / 2, half = i % 2;
      store16_if(exists(token + s, feature + 16 * half, lane), p_.dh + index(token + s, feature + 16 * half, lane),
                 w[s][4 * half], w[s][4 * half + 1], w[s][4 * half + 2], w[s][4 * half + 3]);
    }
  }

  CUTLASS_DEVICE void store_transposed(uint8_t* out, Codes const& codes, int group, int feature, int lane) const {
    const int64_t pitch = round_up(p_.tokens, 32);
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; b += 2) {
      // Features 0 and 1 of both blocks, then 2 and 3, of each token; traded, two features of each block of four
      // tokens.
      uint32_t w[1][4];
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) {
        w[0][s] = permute_bytes(codes[s][b], codes[s][b + 1], 0x5410);
        w[0][s + 2] = permute_bytes(codes[s][b], codes[s][b + 1], 0x7632);
      }
      trade_features_for_tokens(w, lane);
      const uint32_t t01[2] = {permute_bytes(w[0][0], w[0][1], 0x5140), permute_bytes(w[0][0], w[0][1], 0x7362)};
      const uint32_t t23[2] = {permute_bytes(w[0][2], w[0][3], 0x5140), permute_bytes(w[0][2], w[0][3], 0x7362)};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {  // feature 2q + i % 2 of block b + i / 2
        const int row = feature + 8 * (b + i / 2) + 2 * (lane & 3) + i % 2;
        store4_if(row < p_.features && 4 * group < pitch, out + row * pitch + 4 * group,
                  permute_bytes(t01[i / 2], t23[i / 2], i % 2 ? 0x7632 : 0x5410));
      }
    }
  }
};

}  // namespace sparse24::cuda
