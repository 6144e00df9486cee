// The epilogue of linear_gradient: dh = dy * 2 sqrt(y) at the entries that the forward pass kept, straight from the
// accumulators, and both y and dh once more with two of four along tokens.
//
// The fragment and its exchange are those of epilogue_compress.cuh, but nothing is selected: the forward's metadata
// says what is kept. Values and metadata are read as that epilogue stores them, by the same lanes, so that every
// exchange runs backwards.
#pragma once

#include "epilogue_base.cuh"
#include "epilogue_tokens.cuh"
#include "sparse24/linear_gradient.h"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct GradientParams {
  int tokens, features;
  const void* y;        // kept values
  const uint8_t* meta;  // theirs and those of dh
  void* dh;
  TokenParams y_tokens, dh_tokens;
  int32_t* counts;
};

// It needs no shared memory.
struct NoStorage {};

// T: the 16-bit type.
template <class T, int kTileM, int kTileN>
class GradientEpilogue : public EpilogueBase<GradientParams, NoStorage> {
  using Base = EpilogueBase<GradientParams, NoStorage>;
  using Base::p_;

 public:
  using Base::Base;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, Residue const&,
                                 int thread_idx, char*) const {
    using namespace cute;
    static_assert(kTileM % kMetaRowPadding == 0 && kTileN % kMetaRowPadding == 0, "tiles cover the metadata's padding");
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "this tile");
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;  // of 8 columns
    constexpr int kRows = decltype(size<1>(acc))::value;
    constexpr int kParts = kBlocks / kStep * kRows;
    static_assert(kBlocks % kStep == 0 && decltype(size<2>(acc))::value == 1, "one MMA spans the columns");

    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int lane = threadIdx.x & 31, q = lane & 3;
    const int m = get<0>(block_coord) * kTileM - lane / 4, n = get<1>(block_coord) * kTileN - 2 * q;
    // Parts of 16 rows x 64 columns per warp, those of the same columns after each other.
    const auto token = [&](int part) { return m + get<0>(coords(make_coord(_0{}, _0{}, _0{}), part % kRows, _0{})); };
    const auto feature = [&](int part) {
      return n + get<1>(coords(make_coord(_0{}, _0{}, part / kRows * kStep), _0{}, _0{}));
    };

    Forward next = load(token(0), feature(0), lane);
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kBlocks; step += kStep) {
      NonZeros nonzeros;
      CUTLASS_PRAGMA_UNROLL
      for (int mi = 0; mi < kRows; ++mi) {
        const int part = step / kStep * kRows + mi;
        const int t = token(part), f = feature(part);
        const KeptFeatures y = next.arranged(q);
        KeptFeatures dh = y;
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < kStep; ++b) {
          uint32_t dy01 = pack2(T{}, acc(make_coord(_0{}, _0{}, step + b), mi, _0{}),
                                acc(make_coord(_1{}, _0{}, step + b), mi, _0{}));
          uint32_t dy23 = pack2(T{}, acc(make_coord(_0{}, _1{}, step + b), mi, _0{}),
                                acc(make_coord(_1{}, _1{}, step + b), mi, _0{}));
          transpose_pair<1>(dy01, dy23, q & 1);  // four columns of this lane's row
          // Bytes 2 i0, 2 i0 + 1, 2 i1, 2 i1 + 1 of the four.
          const uint32_t nibble = y.nibble(b, q >> 1);
          const uint32_t selector = 0x1010u + (nibble & 3) * 0x22u + (nibble >> 2) * 0x2200u;
          // Beyond the last row and column y is zero, and dy whatever was multiplied: NaN times their zero is none of
          // theirs.
          const bool valid = row(t, lane) < p_.tokens && f + 8 * b < p_.features;
          dh.pairs[b] = times_root(valid ? permute_bytes(dy01, dy23, selector) : 0u, y.pairs[b]);
        }
        // On its way while this part is stored; any earlier it would share the registers with this part's accumulators.
        if (part + 1 < kParts) next = load(token(part + 1), feature(part + 1), lane);
        store(dh, t, f, lane);
        NotCounted not_counted;
        const TokenPart of_warp{p_.tokens, p_.features, t, f};
        store_tokens<T>(p_.y_tokens, of_warp, y, nonzeros);
        store_tokens<T>(p_.dh_tokens, of_warp, dh, not_counted);
      }
      nonzeros.collect(p_.counts, feature(step / kStep * kRows), p_.features);
    }
  }

 private:
  static constexpr int kStep = 8;  // blocks of one metadata atom

  // The row that a lane finishes, of 16 from `token` on.
  CUTLASS_DEVICE static int row(int token, int lane) { return token + lane / 4 + 8 * (lane & 1); }

  // Of the first kept value of an even group in the lane's row.
  CUTLASS_DEVICE int64_t index(int token, int column, int lane) const {
    return int64_t(row(token, lane)) * (p_.features / 2) + column / 2;
  }

  // What a lane loads of 16 rows x 64 columns: 16 neighbouring columns of one row, twice, and its 8 of the 128 bytes of
  // metadata that format.h draws.
  struct Forward {
    uint4 values[2];
    uint2 meta;

    // The exchanges of the forward's stores, each its own inverse.
    CUTLASS_DEVICE KeptFeatures arranged(int q) const {
      KeptFeatures kept;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t w[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
        CUTLASS_PRAGMA_UNROLL
        for (int j = 0; j < 2; ++j) {
          uint32_t &low = kept.pairs[4 * i + j], &high = kept.pairs[4 * i + j + 2];
          low = w[2 * j];
          high = w[2 * j + 1];
          transpose_pair<2>(low, high, q >> 1);
        }
      }
      // Columns k0 and k2 (odd lanes: k1 and k3) of rows r and r + 8, to k0, k2 and k1, k3 of this lane's row.
      uint32_t even = __byte_perm(meta.x, meta.y, 0x5410), odd = __byte_perm(meta.x, meta.y, 0x7632);
      transpose_pair<1>(even, odd, q & 1);
      kept.nibbles[0] = __byte_perm(even, odd, 0x5410);
      kept.nibbles[1] = __byte_perm(even, odd, 0x7632);
      return kept;
    }
  };

  // Zeros that keep (0, 1) beyond the last row and column. Not load16: the kernel may have started while the one before
  // it was writing these, so they are not read-only to it.
  CUTLASS_DEVICE Forward load(int token, int feature, int lane) const {
    const bool odd = lane & 1, high = lane >> 1 & 1;
    Forward out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = feature + 32 * i + 16 * high;
      out.values[i] = make_uint4(0, 0, 0, 0);
      if (row(token, lane) < p_.tokens && column < p_.features)
        out.values[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.y) + index(token, column, lane));
    }
    out.meta = make_uint2(0x44444444u, 0x44444444u);
    if (token / kMetaRowPadding * kMetaRowPadding < p_.tokens && feature < p_.features) {
      const int64_t chunk = int64_t(feature / 64) * (ceil_div(p_.tokens, kMetaRowPadding) * 8) + token / 16;
      out.meta = *reinterpret_cast<const uint2*>(p_.meta + chunk * 128 + odd * 64 + lane / 4 * 8);
    }
    return out;
  }

  // The kept values of dh, where `load` found those of y.
  CUTLASS_DEVICE void store(KeptFeatures const& dh, int token, int feature, int lane) const {
    const bool high = lane >> 1 & 1;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      uint32_t w[4];
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 2; ++j) {
        w[2 * j] = dh.pairs[4 * i + j];
        w[2 * j + 1] = dh.pairs[4 * i + j + 2];
        transpose_pair<2>(w[2 * j], w[2 * j + 1], high);
      }
      const int column = feature + 32 * i + 16 * high;
      if (row(token, lane) < p_.tokens && column < p_.features)
        store16(static_cast<T*>(p_.dh) + index(token, column, lane), w[0], w[1], w[2], w[3]);
    }
  }

  // Two elements of dy * 2 sqrt(y), rounded once.
  CUTLASS_DEVICE static uint32_t times_root(uint32_t dy, uint32_t y) {
    return pack2(T{}, times_root(to_float(T{}, uint16_t(dy)), to_float(T{}, uint16_t(y))),
                 times_root(to_float(T{}, uint16_t(dy >> 16)), to_float(T{}, uint16_t(y >> 16))));
  }
  CUTLASS_DEVICE static float times_root(float dy, float y) { return __fmul_rn(dy, __fmul_rn(2.f, square_root<T>(y))); }
};

}  // namespace sparse24::cuda
