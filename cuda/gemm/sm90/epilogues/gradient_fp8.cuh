// The epilogue of linear_gradient_fp8: dh = dy * 2 sqrt(y) at the entries that the forward pass kept, as float8, and
// both y and dh once more with two of four along tokens.
//
// Rows, columns and the exchange of features for tokens are those of epilogues/gradient.cuh. Codes are held two blocks
// a word: of a token and of a group of four features, the kept pair of block b in the low half and that of b + 1 in the
// high one.
#pragma once

#include "gemm/sm90/epilogues/derivative_fp8.cuh"
#include "gemm/sm90/epilogues/tokens_fp8.cuh"
#include "sparse24/linear_gradient_fp8.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct GradientFp8Params {
  int tokens, features;
  const uint8_t* y;     // kept codes
  const uint8_t* meta;  // theirs and those of dh
  uint8_t* dh;
  TokenParams along_tokens[2];  // y and dh
  int quarter;                  // of the tokens; 0: not interleaved
  DerivativeFp8 derivative;
  const int32_t* slots;  // [features], the row of `hot` that a feature has, or -1; null: no such rows
  uint8_t* hot[2];  // [slots, round_up(tokens, 32)] of y and of dh: all tokens of a feature, in the order of the rows

  static GradientFp8Params of(const LinearGradientFp8Args& args) {
    const auto writable = [](void* p) { return static_cast<uint8_t*>(p); };
    return {int(args.tokens),
            int(args.features),
            static_cast<const uint8_t*>(args.y),
            args.meta,
            writable(args.dh),
            {{args.y_tokens.values, args.y_tokens.meta}, {args.dh_tokens.values, args.dh_tokens.meta}},
            int(args.quarter()),
            {args.scale_grad, args.scale_w, args.scale_y, args.scale_dh, args.amax, args.saturated},
            args.hot_count > 0 ? args.hot_slots : nullptr,
            {writable(args.y_hot), writable(args.dh_hot)}};
  }
};

template <int kTileM, int kTileN>
class GradientFp8Epilogue : public EpilogueBase<GradientFp8Params, NoStorage> {
  using Base = EpilogueBase<GradientFp8Params, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma const&, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(kTileM == 4 * kTileGroups && kTileN % kPartColumns == 0, "whole parts");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    static_assert(decltype(size(TiledMma{}))::value == 128 && decltype(size<1>(acc))::value == 2,
                  "one warpgroup owns the tile, 64 rows at a time");
    constexpr int kParts = kTileN / kPartColumns;
    const int lane = lane_of_tile();
    const int group = get<0>(block_coord) * kTileGroups + thread_idx / 32 * 8 + lane / 4;
    const int n = get<1>(block_coord) * kTileN;
    TradedPart parts[kParts];
    round_accumulators(acc, parts);
    const Tokens tokens = tokens_of(group, lane);
    const Forward next = load(tokens, n, lane);
    const DerivativeFp8::Seen seen = p_.derivative.begin();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts; ++i) trade_features_for_tokens(parts[i].of, lane);
    visit</*kPadded=*/true>(parts, tokens, next, seen, group, n, lane);
  }

  // Does the same with a dy that is in memory, [tokens, features]: lanes load it as they would have it traded.
  CUTLASS_DEVICE void visit_stored(const __nv_bfloat16* dy, int m_tile, int n_tile, int thread_idx) const {
    constexpr int kParts = kTileN / kPartColumns;
    const int lane = thread_idx % 32, group = m_tile * kTileGroups + thread_idx / 32 * 8 + lane / 4;
    const int n = n_tile * kTileN;
    const Tokens tokens = tokens_of(group, lane);
    TradedPart parts[kParts] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (tokens.place + s >= p_.tokens) continue;
      const __nv_bfloat16* row = dy + int64_t(tokens.index[s]) * p_.features + n + 4 * (lane >> 1 & 1);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kParts * kBlocks; ++i) {
        if (n + 8 * i >= p_.features) continue;
        const uint2 w = *reinterpret_cast<const uint2*>(row + 8 * i);
        parts[i / kBlocks].of[i % kBlocks][s] = w.x;
        parts[i / kBlocks].of[i % kBlocks][s + 2] = w.y;
      }
    }
    visit</*kPadded=*/false>(parts, tokens, load(tokens, n, lane), p_.derivative.begin(), group, n, lane);
  }

 private:
  static constexpr int kPartColumns = TradedPart::kColumns, kBlocks = TradedPart::kBlocks;

  // The two tokens whose features a lane has when they are traded.
  struct Tokens {
    int place;     // 4 * group + token of the first
    int index[2];  // of both
  };
  CUTLASS_DEVICE Tokens tokens_of(int group, int lane) const {
    const int place = 4 * group + 2 * (lane & 1);
    return {place, {int(interleaved_token(place, p_.quarter)), int(interleaved_token(place + 1, p_.quarter))}};
  }
  // Lanes that differ in bit 1 have the same tokens, and share the 32 kept values of 64 columns, a sector of 32 bytes.
  CUTLASS_DEVICE int64_t value_index(int token, int feature, int lane) const {
    return int64_t(token) * (p_.features / 2) + feature / 2 + 16 * (lane >> 1 & 1);
  }
  // Those 16 bytes exist.
  CUTLASS_DEVICE bool has_values(Tokens const& tokens, int s, int feature, int lane) const {
    return tokens.place + s < p_.tokens && feature + 32 * (lane >> 1 & 1) < p_.features;
  }

  // Of four blocks of a token, one a byte: the selectors of permute_bytes that make of the kept pairs, and of zeros,
  // features 0 and 1 (the first word) and features 2 and 3. Pairs of odd blocks are in the high half.
  struct SpreadSelectors {
    uint32_t features[2];

    SpreadSelectors() = default;
    CUTLASS_DEVICE explicit SpreadSelectors(uint32_t nibbles) {
      const uint32_t i0 = indices(nibbles), i1 = indices(nibbles >> 2);
      // A feature's nibble is 4, a zero, but 1 at i1 and 0 at i0; if both are the same it is the first. With 2 added it
      // is of the high half, where 6 is a zero as 4 is.
      features[0] = (permute_bytes(0, 0x44441441u, i1) & permute_bytes(0, 0xffffaffau, i0)) | 0x22002200u;
      features[1] = (permute_bytes(0, 0x14414444u, i1) & permute_bytes(0, 0xaffaffffu, i0)) | 0x22002200u;
    }

   private:
    // The lowest two bits of four bytes, a nibble each: what permute_bytes takes to look them up in its second word.
    CUTLASS_DEVICE static uint32_t indices(uint32_t w) {
      w = (w & 0x03030303u) | 0x04040404u;
      return permute_bytes(w + (w >> 4), 0, 0x4420);
    }
  };

  // The kept codes of two tokens, of one group of four features a block, and which of the four they are.
  using Codes = uint32_t[2][kBlocks / 2];
  struct Kept {
    Codes codes;
    Pattern pattern[2];
    SpreadSelectors spread[2][2];  // of each token, and of 32 columns
  };

  // Half of the values of blocks 0 .. 3 or 4 .. 7 of two tokens, both groups of a block a word, to one group of all
  // blocks, two blocks a word; and back.
  CUTLASS_DEVICE static void groups_of_blocks(uint32_t (&w)[4], bool high) {
    const uint32_t first[2] = {permute_bytes(w[0], w[1], 0x5410), permute_bytes(w[2], w[3], 0x5410)};
    const uint32_t second[2] = {permute_bytes(w[0], w[1], 0x7632), permute_bytes(w[2], w[3], 0x7632)};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      w[i] = first[i], w[i + 2] = second[i];
      transpose_pair<2>(w[i], w[i + 2], high);
    }
  }
  CUTLASS_DEVICE static void blocks_of_groups(uint32_t (&w)[4], bool high) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) transpose_pair<2>(w[i], w[i + 2], high);
    const uint32_t blocks[4] = {permute_bytes(w[0], w[2], 0x5410), permute_bytes(w[0], w[2], 0x7632),
                                permute_bytes(w[1], w[3], 0x5410), permute_bytes(w[1], w[3], 0x7632)};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) w[i] = blocks[i];
  }

  // What a lane loads of 64 columns: half of the sector of values, and all of the metadata, of two tokens.
  struct Forward {
    uint4 values[2];
    uint2 meta[2];  // as they lie in memory: to arrange them is to wait for them

    CUTLASS_DEVICE Kept arranged(int lane) const {
      Kept kept;
      const int high = lane >> 1 & 1;
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) {
        uint32_t w[4] = {values[s].x, values[s].y, values[s].z, values[s].w};
        groups_of_blocks(w, high);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) kept.codes[s][i] = w[i];
        kept.pattern[s].columns[0] = meta[s].x >> 4 * high & 0x0f0f0f0fu;
        kept.pattern[s].columns[1] = meta[s].y >> 4 * high & 0x0f0f0f0fu;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) kept.spread[s][i] = SpreadSelectors(kept.pattern[s].columns[i]);
      }
      return kept;
    }
  };

  // Zeros that keep (0, 1) beyond the last row and column. Not load16: the kernel may have started while the one before
  // it was writing these, so they are not read-only to it.
  CUTLASS_DEVICE Forward load(Tokens const& tokens, int feature, int lane) const {
    constexpr uint2 kFirstTwo{0x44444444u, 0x44444444u};
    Forward out{{}, {kFirstTwo, kFirstTwo}};
    const int64_t m_meta = round_up(p_.tokens, kMetaRowPadding);
    const int64_t column = feature / 128 * m_meta * 16 + feature % 128 / 8;
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (tokens.place + s < p_.tokens && feature < p_.features)
        out.meta[s] = *reinterpret_cast<const uint2*>(p_.meta + column + int64_t(tokens.index[s]) * 16);
      if (has_values(tokens, s, feature, lane))
        out.values[s] = *reinterpret_cast<const uint4*>(p_.y + value_index(tokens.index[s], feature, lane));
    }
    return out;
  }

  // Computes and stores everything of a tile. kPadded: dy beyond the last row and column is anything; else zeros.
  template <bool kPadded, int kParts>
  CUTLASS_DEVICE void visit(TradedPart (&parts)[kParts], Tokens const& tokens, Forward next, DerivativeFp8::Seen seen,
                            int group, int n, int lane) const {
    // A loop, with the next part moved to where the code expects it: unrolled, a tile would fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int feature = n + part * kPartColumns;
      // Of features 2 lane and 2 lane + 1.
      int2 slots{-1, -1};
      if (p_.slots && feature + 2 * lane < p_.features)
        slots = *reinterpret_cast<const int2*>(p_.slots + feature + 2 * lane);
      const Kept y = next.arranged(lane);
      if (kPadded && __builtin_expect(tokens.place + 1 >= p_.tokens || feature + kPartColumns > p_.features, false))
        clear_beyond(parts[0].of, tokens, feature);
      Codes dh;
      differentiate(parts[0].of, y, dh, seen);
      // On its way while this part is stored; any earlier it would take registers from the roots.
      if (part + 1 < kParts) next = load(tokens, feature + kPartColumns, lane);
      if (p_.slots) store_hot(slots, y, dh, tokens, lane);
      store(dh, tokens, feature, lane);
      store_tokens(y, dh, group, feature, lane);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 1; i < kParts; ++i) parts[i - 1] = parts[i];
    }
    p_.derivative.collect(seen, lane);
  }

  static constexpr int kBatch = 4;  // pairs whose roots are taken in step: two blocks of both tokens

  // The kept pairs of dy and of y of a batch.
  CUTLASS_DEVICE static void batch(uint32_t const (&dy)[kBlocks][4], Kept const& y, int b, uint32_t (&kept)[kBatch],
                                   uint16_t (&of_y)[kBatch]) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int s = i % 2, block = b + i / 2;
      kept[i] = y.pattern[s].kept(block, dy[block][s], dy[block][s + 2]);
      of_y[i] = uint16_t(y.codes[s][b / 2] >> 16 * (i / 2));
    }
  }

  // Beyond the last row and column y is zero, and dy whatever was multiplied: NaN times their zero is none of theirs.
  CUTLASS_DEVICE void clear_beyond(uint32_t (&dy)[kBlocks][4], Tokens const& tokens, int feature) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4 * kBlocks; ++i) {
      const int block = i / 4, s = i % 2;
      if (tokens.place + s >= p_.tokens || feature + 32 * (block / 4) >= p_.features) dy[block][i % 4] = 0;
    }
  }

  // Codes of dh of what y keeps.
  CUTLASS_DEVICE static void differentiate(uint32_t const (&dy)[kBlocks][4], Kept const& y, Codes& dh,
                                           DerivativeFp8::Seen& seen) {
    uint32_t kept[kBatch];
    uint16_t of_y[kBatch], codes[kBatch];
    float largest = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; b += kBatch / 2) {
      batch(dy, y, b, kept, of_y);
      DerivativeFp8::apply(kept, of_y, codes, seen.to_code, largest);
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) dh[s][b / 2] = pack16(codes[s], codes[s + 2]);
    }
    seen.largest = fmaxf(seen.largest, largest);
    if (__builtin_expect(DerivativeFp8::exceeds(largest, seen.to_code), false)) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kBlocks; b += kBatch / 2) {
        batch(dy, y, b, kept, of_y);
        seen.saturated += DerivativeFp8::saturated_of(kept, of_y, seen.to_code);
      }
    }
  }

  // The kept codes of dh, where `load` found those of y.
  CUTLASS_DEVICE void store(Codes const& dh, Tokens const& tokens, int feature, int lane) const {
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      uint32_t w[4] = {dh[s][0], dh[s][1], dh[s][2], dh[s][3]};
      blocks_of_groups(w, lane >> 1 & 1);
      store16_if(has_values(tokens, s, feature, lane), p_.dh + value_index(tokens.index[s], feature, lane), w[0], w[1],
                 w[2], w[3]);
    }
  }

  // Both along tokens.
  CUTLASS_DEVICE void store_tokens(Kept const& y, Codes const& dh, int group, int feature, int lane) const {
    const TokenPart part{p_.tokens, p_.features, group, feature, lane};
    TokenStoreFp8 of_y(p_.along_tokens[0], part), of_dh(p_.along_tokens[1], part);
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; b += 2) {
      uint32_t w[2][4];  // of y, of dh
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) {  // features 0 and 1, 2 and 3
          const uint32_t selector = y.spread[s][b / 4].features[i] >> 8 * (b % 4);
          w[0][s + 2 * i] = permute_bytes(y.codes[s][b / 2], 0, selector);
          w[1][s + 2 * i] = permute_bytes(dh[s][b / 2], 0, selector);
        }
      }
      trade_features_for_tokens(w, lane);
      of_y.take(b, w[0]);
      of_dh.take(b, w[1]);
    }
  }

  // Features that are kept whole, of the tokens and of the half of each block that this lane has. Lane l brings the
  // slots of features 2l and 2l + 1: columns 2 (l % 4) and + 1 of block l / 4.
  CUTLASS_DEVICE void store_hot(int2 slots, Kept const& y, Codes const& dh, Tokens const& tokens, int lane) const {
    uint32_t found = __ballot_sync(0xffffffffu, slots.x >= 0 || slots.y >= 0);
    const int64_t ld = round_up(p_.tokens, 32);
    CUTLASS_PRAGMA_NO_UNROLL
    while (found != 0) {
      const int source = __ffs(int(found)) - 1, block = source / 4;
      found &= found - 1;
      const int of_source[2] = {__shfl_sync(0xffffffffu, slots.x, source), __shfl_sync(0xffffffffu, slots.y, source)};
      uint32_t pairs[2][2], nibbles[2];
      const auto take = [&](int i) {  // registers have no index
        CUTLASS_PRAGMA_UNROLL
        for (int s = 0; s < 2; ++s) {
          pairs[0][s] = y.codes[s][i];
          pairs[1][s] = dh[s][i];
          nibbles[s] = y.pattern[s].columns[i / 2];
        }
      };
      static_assert(kBlocks == 8, "a case for each two");
      switch (block / 2) {
        case 0: take(0); break;
        case 1: take(1); break;
        case 2: take(2); break;
        default: take(3);
      }
      if (source % 4 / 2 != (lane >> 1 & 1) || tokens.place >= p_.tokens) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        if (of_source[c] < 0) continue;
        const uint32_t place = 2 * (source & 1) + c;
        CUTLASS_PRAGMA_UNROLL
        for (int which = 0; which < 2; ++which) {
          uint32_t codes = 0;  // of both tokens; the second may lie behind the last one, and is zero
          CUTLASS_PRAGMA_UNROLL
          for (int s = 0; s < 2; ++s) {
            const uint32_t pair = pairs[which][s] >> 16 * (block & 1), nibble = nibbles[s] >> 8 * (block & 3) & 0xf;
            const uint32_t code = (nibble & 3) == place ? pair : nibble >> 2 == place ? pair >> 8 : 0u;
            codes |= (code & 0xff) << 8 * s;
          }
          *reinterpret_cast<uint16_t*>(p_.hot[which] + of_source[c] * ld + tokens.place) = uint16_t(codes);
        }
      }
    }
  }
};

}  // namespace sparse24::cuda
