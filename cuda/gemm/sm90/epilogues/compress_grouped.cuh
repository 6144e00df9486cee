// The epilogue of linear_compress with a 2:4 weight in tiles of one warpgroup, whose product is h.T: rows of the tile
// are features, columns are tokens. Activation, two of four and metadata, as epilogues/compress.cuh stores them.
//
// The rows of the tile are in an order (mainloops/grouped_sparse.cuh) in which the fragment of a thread holds groups of
// four features whole. Of 8 columns, lane 4 g + q of warp w holds
//
//     rows g, g + 8, g + 64, g + 72 (+ 16 w)  =  features 0 .. 3 of group 8 w + g
//     columns 2q, 2q + 1                      =  two tokens, which are selected at once
//
// A kept pair of 16 bits is a word, which eight lanes make 32 bytes of. One of float8 is 16 bits, as the nibbles of
// four blocks are: an 8 x 8 matrix of groups and tokens, which one instruction transposes, so that a lane has one
// token.
//
// Rounding and selection are those of elementwise/compress.cu: results are bit-identical to the two steps.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/compress.cuh"
#include "gemm/sm90/epilogues/gradient.cuh"
#include "gemm/sm90/epilogues/tokens_fp8.cuh"
#include "sparse24/packed.h"
#include "sparsity/select24.cuh"

namespace sparse24::cuda {

// A feature has acc * scale + shift; two neighbouring tokens have acc * scale, and the inverse scales of y.
template <int kTileM, int kTileN>
struct GroupedOperands {
  static constexpr int kM = kTileM, kN = kTileN;
  struct alignas(8) Feature {
    float scale, shift;
  };
  struct alignas(16) Tokens {
    float scale[2], inverse[2];
  };
  Tokens tokens[kTileN / 2];
  Feature features[kTileM];
};

// h is rounded to T. Values are e4m3 and the metadata that of fp8 with kFp8, and T and that of 16 bits without.
// Features come in multiples of 32, so that a warp has all of its features, or none.
template <class T, bool kFp8, int kTileM, int kTileN>
class GroupedCompressEpilogue : public EpilogueBase<CompressParams, OperandStages<GroupedOperands<kTileM, kTileN>>> {
  using Base = EpilogueBase<CompressParams, OperandStages<GroupedOperands<kTileM, kTileN>>>;
  using Base::p_;

 public:
  using Base::Base;
  using Operands = GroupedOperands<kTileM, kTileN>;

  // Tokens and features beyond h are never stored, but their metadata is, so that their operands have to be defined.
  template <class Problem, class BlockShape, class BlockCoord>
  CUTLASS_DEVICE void fetch(int lane, Problem const&, BlockShape const&, BlockCoord const& block_coord,
                            Operands& operands) const {
    const LinearParams& h = p_.linear;
    const int m = cute::get<0>(block_coord) * kTileM, n = cute::get<1>(block_coord) * kTileN;
    // All loads come before the stores, or each would wait for the one before.
    typename Operands::Feature features[kTileM / 32];
    typename Operands::Tokens tokens[kTileN / 64];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileM / 32; ++i) {
      const int feature = m + 32 * i + lane;
      features[i] = {1.f, 0.f};
      if (feature < h.cols && h.scale_w) features[i].scale = h.scale_w[feature * h.scale_w_stride];
      if (feature < h.cols && h.bias) features[i].shift = float(static_cast<const T*>(h.bias)[feature]);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN / 64; ++i) {
      tokens[i] = {{1.f, 1.f}, {1.f, 1.f}};
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int token = n + 2 * (32 * i + lane) + c;
        if (token < h.rows && h.scale_x) tokens[i].scale[c] = h.scale_x[token * h.scale_x_stride];
        if (token < h.rows && h.scale_y)
          tokens[i].inverse[c] = __frcp_rn(usable_scale(h.scale_y[token * h.scale_y_stride]));
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileM / 32; ++i) operands.features[32 * i + lane] = features[i];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kTileN / 64; ++i) operands.tokens[32 * i + lane] = tokens[i];
  }

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma const&, int thread_idx,
                                 Operands const& operands) const {
    using namespace cute;
    static_assert(kTileM == 128 && kTileN % kPartTokens == 0, "whole parts");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    static_assert(decltype(size(TiledMma{}))::value == 128 && decltype(size<1>(acc))::value == 2,
                  "one warpgroup owns the tile, 64 rows at a time");
    const LinearParams& h = p_.linear;
    const int lane = lane_of_tile(), in_tile = thread_idx / 32 * 32;
    const Place at{lane, int(get<0>(block_coord)) * kTileM + in_tile, int(get<1>(block_coord)) * kTileN};
    // Accumulators become roots before anything else, because they leave no registers.
    uint32_t roots[kTileN / 4][2];  // of features 0 and 1 of the first block, 2 and 3 of it, and so on
    if (h.scale_x || h.scale_w || h.bias) {
      typename Operands::Feature features[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) features[i] = operands.features[in_tile + lane / 4 * 4 + i];
      take_all(acc, roots, [&](int block, auto of_block) {
        const float* scale = operands.tokens[4 * block + (lane & 3)].scale;
        const float token[2] = {scale[0], scale[1]};
        // The product with the token's scale comes first, as where tokens are rows: the same bits.
        of_block([&](int i, int c, float v) { return v * token[c] * features[i].scale + features[i].shift; });
      });
    } else {
      take_all(acc, roots, [&](int, auto of_block) { of_block([](int, int, float v) { return v; }); });
    }
    h.activation.template finish<T>(roots);
    compiler_fence();
    if (wants_every_value(at, roots, operands)) {
      visit<true>(at, roots, operands);
    } else {
      visit<false>(at, roots, operands);
    }
  }

 private:
  static constexpr int kPartTokens = 64, kBlocks = kPartTokens / 8;
  static constexpr int kParts = kTileN / kPartTokens, kWords = kPartTokens / 4;

  // A lane, the first of its warp's features, and the first token of its tile, or of a part of it.
  struct Place {
    int lane, feature, token;
    CUTLASS_DEVICE int q() const { return lane & 3; }
    CUTLASS_DEVICE int g() const { return lane >> 2; }
  };

  // Hands of(block, each) the accumulators of a block: each(f) makes roots of f(feature, token, accumulator).
  template <class Accumulators, class Of>
  CUTLASS_DEVICE static void take_all(Accumulators const& acc, uint32_t (&roots)[kTileN / 4][2], Of of) {
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < kTileN / 8; ++block) {
      of(block, [&](auto f) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const auto a = [&](int c) { return acc(cute::make_coord(c, i % 2, block), i / 2, 0); };
          roots[2 * block + i / 2][i % 2] = EpilogueActivation::pack<T>(f(i, 0, a(0)), f(i, 1, a(1)));
        }
      });
    }
  }

  // Whether the general form is wanted: for another activation than the squared ReLU; to count what saturates, if
  // anything may; and to leave tokens out of the statistics that do not exist. Else it finds the largest y itself,
  // which costs half an instruction a value.
  CUTLASS_DEVICE bool wants_every_value(Place const& at, uint32_t const (&roots)[kTileN / 4][2],
                                        Operands const& operands) const {
    const LinearParams& h = p_.linear;
    if (h.activation.template is_general<T>()) return true;
    if (!h.amax && !h.saturated) return false;
    if (at.token + kTileN > h.rows) return true;
    uint32_t of_halves = 0;
    CUTLASS_PRAGMA_UNROLL
    for (auto const& pair : roots) of_halves = larger_roots<T>(larger_roots<T>(of_halves, pair[0]), pair[1]);
    ActivationStatistics seen;
    float inverse = 0.f;  // the largest
    if (at.feature < h.cols) {
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c)
        seen.amax = fmaxf(seen.amax, h.activation.template value<T, /*kGeneral=*/false>(of_halves, c));
      if constexpr (kFp8) {
        CUTLASS_PRAGMA_NO_UNROLL
        for (int b = 0; b < (h.scale_y_stride ? kTileN / 8 : 1); ++b) {
          const float* of_two = operands.tokens[4 * b + at.q()].inverse;
          inverse = fmaxf(inverse, fmaxf(fabsf(of_two[0]), fabsf(of_two[1])));
        }
      }
    }
    if (__ballot_sync(0xffffffffu, ActivationStatistics::exceeds(seen.amax, inverse)) != 0) return true;
    seen.collect(h);
    return false;
  }

  template <bool kGeneral>
  CUTLASS_DEVICE void visit(Place at, uint32_t (&roots)[kTileN / 4][2], Operands const& operands) const {
    ActivationStatistics seen;
    // A loop, with the next part moved to where the code expects it: unrolled, a tile would fill the instruction cache.
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < kParts; ++part) {
      visit_part<kGeneral>(at, roots, operands.tokens + part * (kPartTokens / 2), seen);
      at.token += kPartTokens;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < (kParts - 1) * kWords; ++i) {
        roots[i][0] = roots[i + kWords][0];
        roots[i][1] = roots[i + kWords][1];
      }
    }
    if constexpr (kGeneral) seen.collect(p_.linear);
  }

  template <bool kGeneral>
  CUTLASS_DEVICE void visit_part(Place const& at, uint32_t const (&roots)[kTileN / 4][2],
                                 typename Operands::Tokens const* tokens, ActivationStatistics& seen) const {
    const bool features = at.feature < p_.linear.cols;
    uint32_t nibbles = 0;  // of four blocks, of two tokens in the halves
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
      const uint32_t m[4] = {roots[2 * b][0], roots[2 * b][1], roots[2 * b + 1][0], roots[2 * b + 1][1]};
      const KeptPairs kept = keep_two_pairs(m, m);
      const uint32_t of_block = kept.nibbles & 0x000f000fu << 4 * (b % 4);
      nibbles = b % 4 == 0 ? of_block : nibbles | of_block;
      if constexpr (kFp8) {
        store_fp8<kGeneral>(at, b, kept, tokens[4 * b + at.q()], features, seen);
      } else {
        store_16bit<kGeneral>(at, b, kept, features, seen);
      }
      if (b % 4 == 3) store_meta(at, b - 3, nibbles, features);
    }
  }

  template <bool kGeneral>
  CUTLASS_DEVICE void store_16bit(Place const& at, int b, KeptPairs const& kept, bool features,
                                  ActivationStatistics& seen) const {
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const uint32_t roots = permute_bytes(kept.first, kept.second, c ? 0x7632 : 0x5410);
      const int token = at.token + 8 * b + 2 * at.q() + c;
      const bool exists = features && token < p_.linear.rows;
      if (kGeneral && exists) {  // the largest of a group is always kept
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 2; ++i) seen.see(p_.linear.activation.template value<T, kGeneral>(roots, i), 0.f);
      }
      const int64_t to = int64_t(token) * (p_.linear.cols / 2) + at.feature / 2 + 2 * at.g();
      store4_if(exists, static_cast<T*>(p_.values) + to, p_.linear.activation.template values<T, kGeneral>(roots));
    }
  }

  // Of eight tokens of a block lane 4 r + i then has token r, groups 2i and 2i + 1.
  template <bool kGeneral>
  CUTLASS_DEVICE void store_fp8(Place const& at, int b, KeptPairs const& kept, typename Operands::Tokens const& tokens,
                                bool features, ActivationStatistics& seen) const {
    uint16_t pairs[2];
    CUTLASS_PRAGMA_UNROLL
    for (int c = 0; c < 2; ++c) {
      const float y[2] = {p_.linear.activation.template value<T, kGeneral>(kept.first, c),
                          p_.linear.activation.template value<T, kGeneral>(kept.second, c)},
                  inverse = tokens.inverse[c];
      if (kGeneral && features && at.token + 8 * b + 2 * at.q() + c < p_.linear.rows) {
        seen.see(y[0], inverse);  // the largest of a group is always kept
        seen.see(y[1], inverse);
      }
      pairs[c] = to_e4m3x2(__fmul_rn(y[0], inverse), __fmul_rn(y[1], inverse));
    }
    const uint32_t groups = transpose_8x8(pack16(pairs[0], pairs[1]));
    const int token = at.token + 8 * b + at.g();
    const int64_t to = int64_t(token) * (p_.linear.cols / 2) + at.feature / 2 + 4 * at.q();
    store4_if(features && token < p_.linear.rows, static_cast<char*>(p_.values) + to, groups);
  }

  // Nibbles of blocks b .. b + 3, lowest first, of two tokens: afterwards lane 4 r + i has those of 32 features of
  // token r of block b + i.
  CUTLASS_DEVICE void store_meta(Place const& at, int b, uint32_t nibbles, bool features) const {
    const uint32_t groups = transpose_8x8(nibbles);                           // 2i in the low half, 2i + 1 in the high
    const uint32_t even = (groups & 0x0f0fu) | (groups >> 12 & 0xf0f0u);      // of blocks b and b + 2, both groups
    const uint32_t odd = (groups >> 4 & 0x0f0fu) | (groups >> 16 & 0xf0f0u);  // of blocks b + 1 and b + 3
    const int i = at.q(), token = at.token + 8 * (b + i) + at.g();
    uint32_t word = transpose_bytes_of_quad(permute_bytes(even, odd, 0x5140), i);
    // Its padding is stored too.
    if (!features || token >= p_.linear.rows) word = 0x01010101u * kMetaPaddingByte;
    const bool stored = token < p_.a.m_meta && at.feature < p_.a.k_meta;
    if constexpr (kFp8) {
      store4_if(stored, p_.meta + (at.feature / 128 * p_.a.m_meta + token) * 16 + at.feature % 128 / 8, word);
    } else {
      // Tokens r and r + 8 are neighbours: lanes of both trade 16 features for the other token.
      const uint32_t got = __shfl_xor_sync(0xffffffffu, word, 1);
      word = i % 2 ? permute_bytes(got, word, 0x7632) : permute_bytes(word, got, 0x5410);
      store4_if(stored,
                p_.meta + (at.feature / 64 * p_.a.m_meta + token / 16 * 16) * 8 + i % 2 * 64 + at.g() * 8 +
                    at.feature % 64 / 32 * 4,
                word);
    }
  }
};

}  // namespace sparse24::cuda
