// The epilogue of linear_gradient: dh = dy * 2 sqrt(y) at the entries that the forward pass kept, straight from the
// accumulators, and both y and dh once more with two of four along tokens. In float16 the forward pass may have kept
// the roots of y instead.
//
// The rows of the tile are in an order (place_of_row) in which the fragment of a thread holds groups of four tokens
// whole, so that nothing is exchanged to select along tokens. Of 8 columns, lane 4 g + q holds
//
//     rows g, g + 8, g + 64, g + 72 (+ 16 warp)  =  tokens 0 .. 3 of group 8 warp + g
//     columns 2q, 2q + 1
//
// Along features two lanes share a group of four; they trade features for tokens:
//
//     lane q     before                           after
//     even       tokens 0 .. 3, features 0, 1     tokens 0, 1, features 0 .. 3
//     odd        tokens 0 .. 3, features 2, 3     tokens 2, 3, features 0 .. 3
//
// then dh is what the forward's metadata keeps, and both matrices go the way back. Whether the tokens of a group are
// neighbours or a quarter apart is a matter of which rows of grad are loaded (mainloops/grouped_rows.cuh).
#pragma once

#include "common/activation.cuh"
#include "common/bits.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/base.cuh"
#include "gemm/sm90/epilogues/derivative.cuh"
#include "gemm/sm90/epilogues/tokens.cuh"
#include "sparse24/linear_gradient.h"
#include "sparsity/kept_pattern.cuh"

namespace sparse24::cuda {

// A tile of 128 rows holds so many groups of four tokens; place_of_row is the place 4 * group + token of a row of the
// GEMM.
inline constexpr int kTileGroups = 32;
SPARSE24_HD constexpr int place_of_row(int row) {
  const int group = row / 128 * kTileGroups + row % 64 / 16 * 8 + row % 8;
  return 4 * group + row % 128 / 64 * 2 + row % 16 / 8;
}

// LinearGradientArgs as the device sees them.
template <class T>
struct GradientParams {
  int tokens, features;
  const void* y;        // kept values, or their roots
  const uint8_t* meta;  // theirs and those of dh
  void* dh;
  TokenParams along_tokens[2];  // y and dh; null: not wanted
  int32_t* counts;              // null: not wanted
  int quarter;                  // of the tokens; 0: not interleaved
  StoredDerivative<T> derivative;
  const int32_t* slots;  // [features], the row of `hot` that a feature has, or -1; null: no such rows
  void* hot[2];          // [slots, tokens] of y and of dh: all tokens of a feature
};

#ifdef __CUDACC__  // inline PTX; tests/cpp/emulator/ptx.h has it for hosts
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }
// Returns the lane, found anew for each tile: what follows from it would otherwise be kept in registers from tile to
// tile, and the accumulators leave none.
__device__ __forceinline__ int lane_of_tile() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
#endif

// All values are of the 16-bit type T. kFp8Meta gives the metadata of y the layout of fp8; along tokens it has that of
// T. kCounts says whether non-zeros are counted, if there is anything along tokens.
template <class T, bool kFp8Meta, bool kCounts, int kTileM, int kTileN>
class GradientEpilogue : public EpilogueBase<GradientParams<T>, NoStorage> {
  using Base = EpilogueBase<GradientParams<T>, NoStorage>;
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
    // dy is rounded first, because the accumulators leave no registers for anything else.
    Traded parts[kParts];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts; ++i) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4 * kBlocks; ++j) {
        const int b = j / 4, token = j % 4;
        const auto of = [&](int c) { return acc(make_coord(c, token % 2, i * kBlocks + b), token / 2, 0); };
        parts[i].of[b][token] = pack2(T{}, of(0), of(1));
      }
    }
    compiler_fence();
    const Tokens tokens = tokens_of(group, lane);
    const Forward next = load(tokens, n, lane);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts; ++i) trade_features_for_tokens(parts[i].of, lane);
    visit</*kPadded=*/true>(parts, tokens, next, group, n, lane);
  }

  // Does the same with a dy that is in memory, [tokens, features]: lanes load it as they would have it traded.
  CUTLASS_DEVICE void visit_stored(const T* dy, int m_tile, int n_tile, int thread_idx) const {
    constexpr int kParts = kTileN / kPartColumns;
    const int lane = thread_idx % 32, group = m_tile * kTileGroups + thread_idx / 32 * 8 + lane / 4;
    const int n = n_tile * kTileN;
    const Tokens tokens = tokens_of(group, lane);
    Traded parts[kParts] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (tokens.place + s >= p_.tokens) continue;
      const T* row = dy + int64_t(tokens.index[s]) * p_.features + n + 4 * (lane >> 1 & 1);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kParts * kBlocks; ++i) {
        if (n + 8 * i >= p_.features) continue;
        const uint2 w = *reinterpret_cast<const uint2*>(row + 8 * i);
        parts[i / kBlocks].of[i % kBlocks][s] = w.x;
        parts[i / kBlocks].of[i % kBlocks][s + 2] = w.y;
      }
    }
    visit</*kPadded=*/false>(parts, tokens, load(tokens, n, lane), group, n, lane);
  }

 private:
  static constexpr int kPartColumns = 64, kBlocks = kPartColumns / 8;  // those of one metadata atom

  // dy of 64 columns, features traded for tokens.
  struct Traded {
    uint32_t of[kBlocks][4];
  };

  // The two tokens whose features a lane has when they are traded.
  struct Tokens {
    int place;               // 4 * group + token of the first
    int index[2];            // of both
    const uint8_t* meta[2];  // theirs in the first column of the metadata
    bool lower[2];           // whether a token is one of the second eight of its 16
  };
  // Lanes that differ in bit 1 have the same tokens, and share the kept values of 32 columns, a sector of 32 bytes: the
  // index of a lane's first value of sector i of 64 columns.
  CUTLASS_DEVICE int64_t value_index(int token, int feature, int i, int lane) const {
    return int64_t(token) * (p_.features / 2) + feature / 2 + 16 * i + 8 * (lane >> 1 & 1);
  }
  // Whether those 16 bytes exist.
  CUTLASS_DEVICE bool has_values(Tokens const& tokens, int s, int feature, int i, int lane) const {
    return tokens.place + s < p_.tokens && feature + 32 * i + 16 * (lane >> 1 & 1) < p_.features;
  }
  // Where the metadata of y lies, by token and by the first of 64 columns. fp8 has 16 bytes a row for 128 columns. 16
  // bits have two bytes for each 16 columns k0 .. k3 of 64, where format.h draws them, and those of the token eight
  // further.
  CUTLASS_DEVICE static int64_t meta_row(int64_t t) { return kFp8Meta ? t * 16 : t / 16 * 128 + t % 8 * 8; }
  CUTLASS_DEVICE int64_t meta_column(int column) const {
    const int64_t m_meta = round_up(p_.tokens, kMetaRowPadding);
    return kFp8Meta ? column / 128 * m_meta * 16 + column % 128 / 8 : column / 64 * m_meta * 8;
  }
  CUTLASS_DEVICE Tokens tokens_of(int group, int lane) const {
    Tokens out{};
    out.place = 4 * group + 2 * (lane & 1);
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      const int64_t t = interleaved_token(out.place + s, p_.quarter);
      out.index[s] = int(t);
      out.meta[s] = p_.meta + meta_row(t);
      out.lower[s] = t & 8;
    }
    return out;
  }

  // The kept pairs of two tokens, of one group of four features a block, and which of the four they are.
  using Pairs = uint32_t[2][kBlocks];
  struct Kept {
    Pairs pairs;
    Pattern pattern[2];
  };

  // What a lane loads of 64 columns: half of each sector of values, and all of the metadata, of two tokens.
  struct Forward {
    uint4 values[2][2];
    uint2 meta[2][2];  // as they lie in memory: to arrange them is to wait for them

    CUTLASS_DEVICE Kept arranged(Tokens const& tokens, int lane) const {
      Kept kept;
      const int high = lane >> 1 & 1;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int s = i / 2, b = 4 * (i % 2);
        const uint4 w = values[s][i % 2];
        // A lane has loaded two groups of each of two blocks; one gets the even groups of all four blocks, the other
        // the odd ones.
        kept.pairs[s][b] = w.x, kept.pairs[s][b + 2] = w.y;
        kept.pairs[s][b + 1] = w.z, kept.pairs[s][b + 3] = w.w;
        transpose_pair<2>(kept.pairs[s][b], kept.pairs[s][b + 2], high);
        transpose_pair<2>(kept.pairs[s][b + 1], kept.pairs[s][b + 3], high);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) {
        uint32_t columns[2] = {meta[s][0].x, meta[s][0].y};  // 32 columns each
        if constexpr (!kFp8Meta) {
          // The first words have k0 and k2 of both tokens, the second k1 and k3.
          const uint32_t selector = tokens.lower[s] ? 0x7632 : 0x5410;
          columns[0] = permute_bytes(meta[s][0].x, meta[s][1].x, selector);
          columns[1] = permute_bytes(meta[s][0].y, meta[s][1].y, selector);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) kept.pattern[s].columns[i] = columns[i] >> 4 * high & 0x0f0f0f0fu;
      }
      return kept;
    }
  };

  // Loads what the forward pass stored, and zeros that keep (0, 1) beyond the last row and column. It does not use
  // load16, because the kernel may have started while the one before it was writing these, which are therefore not
  // read-only.
  CUTLASS_DEVICE Forward load(Tokens const& tokens, int feature, int lane) const {
    constexpr uint2 kFirstTwo{0x44444444u, 0x44444444u};
    Forward out{{}, {{kFirstTwo, kFirstTwo}, {kFirstTwo, kFirstTwo}}};
    const int64_t column = meta_column(feature);
    CUTLASS_PRAGMA_UNROLL
    for (int s = 0; s < 2; ++s) {
      if (tokens.place + s >= p_.tokens || feature >= p_.features) continue;
      out.meta[s][0] = *reinterpret_cast<const uint2*>(tokens.meta[s] + column);
      if (!kFp8Meta) out.meta[s][1] = *reinterpret_cast<const uint2*>(tokens.meta[s] + column + 64);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = i / 2, sector = i % 2;
      if (!has_values(tokens, s, feature, sector, lane)) continue;
      const T* values = static_cast<const T*>(p_.y) + value_index(tokens.index[s], feature, sector, lane);
      out.values[s][sector] = *reinterpret_cast<const uint4*>(values);
    }
    return out;
  }

  // Computes and stores everything of a tile. kPadded: dy beyond the last row and column is anything; else zeros.
  template <bool kPadded, int kParts>
  CUTLASS_DEVICE void visit(Traded (&parts)[kParts], Tokens const& tokens, Forward next, int group, int n,
                            int lane) const {
    // This is a loop, with the next part moved to where the code expects it, because unrolled the code of a tile would
    // fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int feature = n + part * kPartColumns;
      // A lane brings the slots of features 2 lane and 2 lane + 1.
      int2 slots{-1, -1};
      if (p_.slots && feature + 2 * lane < p_.features)
        slots = *reinterpret_cast<const int2*>(p_.slots + feature + 2 * lane);
      Kept y = next.arranged(tokens, lane);
      Pairs dh;
      differentiate<kPadded>(parts[0].of, y, tokens, feature, dh);
      if (p_.derivative.roots()) square(y);
      // The next part is on its way while this one is stored; any earlier it would take registers from the roots.
      if (part + 1 < kParts) next = load(tokens, feature + kPartColumns, lane);
      if (p_.slots) store_hot(slots, y, dh, tokens, lane);
      store(dh, tokens, feature, lane);
      if (p_.along_tokens[0].values) store_tokens(y, dh, group, feature, lane);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 1; i < kParts; ++i) parts[i - 1] = parts[i];
    }
  }

  // Computes dh of what y keeps.
  template <bool kPadded>
  CUTLASS_DEVICE void differentiate(uint32_t const (&dy)[kBlocks][4], Kept const& y, Tokens const& tokens, int feature,
                                    Pairs& dh) const {
    constexpr int kBatch = 4;  // pairs whose roots are taken in step
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; b += kBatch / 2) {
      uint32_t kept[kBatch], of_y[kBatch];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        const int s = i % 2, block = b + i / 2;
        // Beyond the last row and column y is zero, and dy whatever was multiplied: NaN times their zero is none of
        // theirs.
        const bool valid = !kPadded || (tokens.place + s < p_.tokens && feature + 8 * block < p_.features);
        kept[i] = valid ? y.pattern[s].kept(block, dy[block][s], dy[block][s + 2]) : 0u;
        of_y[i] = y.pairs[s][block];
      }
      p_.derivative.apply(kept, of_y);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kBatch; ++i) dh[i % 2][b + i / 2] = kept[i];
    }
  }

  // Turns roots into y, as linear_compress squares them.
  CUTLASS_DEVICE static void square(Kept& y) {
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      CUTLASS_PRAGMA_UNROLL
      for (int s = 0; s < 2; ++s) y.pairs[s][b] = square2<T>(y.pairs[s][b]);
    }
  }

  // Stores the kept values of dh where `load` found those of y.
  CUTLASS_DEVICE void store(Pairs const& dh, Tokens const& tokens, int feature, int lane) const {
    const bool high = lane >> 1 & 1;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = i / 2, sector = i % 2, b = 4 * sector;
      uint32_t w[4] = {dh[s][b], dh[s][b + 2], dh[s][b + 1], dh[s][b + 3]};
      transpose_pair<2>(w[0], w[1], high);
      transpose_pair<2>(w[2], w[3], high);
      T* values = static_cast<T*>(p_.dh) + value_index(tokens.index[s], feature, sector, lane);
      if (has_values(tokens, s, feature, sector, lane)) store16(values, w[0], w[1], w[2], w[3]);
    }
  }

  // Stores both matrices along tokens, and counts how many tokens use a feature of y.
  CUTLASS_DEVICE void store_tokens(Kept const& y, Pairs const& dh, int group, int feature, int lane) const {
    const TokenPart part{p_.tokens, p_.features, group, feature, lane};
    TokenStore<T> of_y(p_.along_tokens[0], part), of_dh(p_.along_tokens[1], part);
    NonZeros nonzeros;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kBlocks / 2; ++i) {
      const int b = 4 * (i & 1) + (i & 2);  // as TokenStore wants them
      uint32_t w[4][4];                     // of y, then of dh: blocks b and b + 1, dense, two features a word
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 8; ++j) {
        const int s = j % 2, block = b + j / 2 % 2;
        const uint32_t pair = j < 4 ? y.pairs[s][block] : dh[s][block];
        y.pattern[s].spread(block, pair, w[j / 2][s], w[j / 2][s + 2]);
      }
      trade_features_for_tokens(w, lane);
      if constexpr (kCounts) {
        nonzeros.see(b, w[0]);
        nonzeros.see(b + 1, w[1]);
      }
      of_y.take(b, w[0], w[1]);
      of_dh.take(b, w[2], w[3]);
    }
    of_y.store_meta();
    of_dh.store_meta();
    if constexpr (kCounts) nonzeros.collect(p_.counts, feature, p_.features, lane);
  }

  // Stores the features that are kept whole, those tokens and that half of each block that this lane has. Lane l brings
  // the slots of features 2l and 2l + 1, which are columns 2 (l % 4) and 2 (l % 4) + 1 of block l / 4.
  CUTLASS_DEVICE void store_hot(int2 slots, Kept const& y, Pairs const& dh, Tokens const& tokens, int lane) const {
    uint32_t found = __ballot_sync(0xffffffffu, slots.x >= 0 || slots.y >= 0);
    CUTLASS_PRAGMA_NO_UNROLL
    while (found != 0) {
      const int source = __ffs(int(found)) - 1, block = source / 4;
      found &= found - 1;
      const int of_source[2] = {__shfl_sync(0xffffffffu, slots.x, source), __shfl_sync(0xffffffffu, slots.y, source)};
      uint32_t pairs[2][2], nibbles[2];
      const auto take = [&](int b) {
        CUTLASS_PRAGMA_UNROLL
        for (int s = 0; s < 2; ++s) {
          pairs[0][s] = y.pairs[s][b];
          pairs[1][s] = dh[s][b];
          nibbles[s] = y.pattern[s].columns[b / 4] >> 8 * (b % 4) & 0xf;
        }
      };
      static_assert(kBlocks == 8, "a case for each");
      switch (block) {  // registers have no index
        case 0: take(0); break;
        case 1: take(1); break;
        case 2: take(2); break;
        case 3: take(3); break;
        case 4: take(4); break;
        case 5: take(5); break;
        case 6: take(6); break;
        default: take(7);
      }
      if (source % 4 / 2 != (lane >> 1 & 1)) continue;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int c = i / 2, s = i % 2;
        if (of_source[c] < 0 || tokens.place + s >= p_.tokens) continue;
        const int64_t to = int64_t(of_source[c]) * p_.tokens + interleaved_token(tokens.place + s, p_.quarter);
        const uint32_t place = 2 * (source & 1) + c;
        CUTLASS_PRAGMA_UNROLL
        for (int which = 0; which < 2; ++which) {
          const uint32_t pair = pairs[which][s];
          static_cast<uint16_t*>(p_.hot[which])[to] = (nibbles[s] & 3) == place  ? uint16_t(pair)
                                                      : nibbles[s] >> 2 == place ? uint16_t(pair >> 16)
                                                                                 : uint16_t{0};
        }
      }
    }
  }
};

}  // namespace sparse24::cuda
