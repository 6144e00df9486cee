// The epilogue of linear_relu2: y = relu(h)^2, dense, straight from the accumulators.
//
// The fragment is that of epilogue_store.cuh. 16-bit results are transposed over the quad four blocks of 8 columns at a
// time, fp8 results eight, so that each lane stores 16 bytes of one row.
#pragma once

#include "epilogue_hidden.cuh"
#include "quad.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct Relu2Params {
  HiddenParams hidden;
  void* y;
};

// T: the type that h is rounded to. kFp8: y is e4m3; otherwise T.
template <class T, bool kFp8, int kTileM, int kTileN>
class Relu2Epilogue : public EpilogueBase<Relu2Params, TermsStages<TileTerms<kTileM, kTileN>>> {
  using Base = EpilogueBase<Relu2Params, TermsStages<TileTerms<kTileM, kTileN>>>;
  using Base::p_;

 public:
  using Base::Base;
  using Terms = TileTerms<kTileM, kTileN>;

  template <class Problem, class BlockShape, class BlockCoord>
  CUTLASS_DEVICE void fetch(int lane, Problem const&, BlockShape const&, BlockCoord const& block_coord,
                            Terms& terms) const {
    using namespace cute;
    p_.hidden.template fetch<T>(lane, get<0>(block_coord) * kTileM, get<1>(block_coord) * kTileN, terms);
  }

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, int thread_idx,
                                 Terms const& terms) const {
    using namespace cute;
    static_assert(is_same_v<decltype(take<0, 2>(block_shape)), Shape<Int<kTileM>, Int<kTileN>>>, "terms of this tile");
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int m_tile = get<0>(block_coord) * kTileM, n_tile = get<1>(block_coord) * kTileN;
    // One decision for the whole tile: the loops below are too long to decide in.
    if (p_.hidden.amax || p_.hidden.saturated) {
      store<true>(m_tile, n_tile, acc, coords, terms);
    } else {
      store<false>(m_tile, n_tile, acc, coords, terms);
    }
  }

 private:
  static constexpr int kStep = kFp8 ? 8 : 4;  // blocks whose columns of one row fill 4 x 16 bytes

  template <bool kStatistics, class Acc, class Coords>
  CUTLASS_DEVICE void store(int m_tile, int n_tile, Acc const& acc, Coords const& coords, Terms const& terms) const {
    using namespace cute;
    const HiddenParams& hidden = p_.hidden;
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    constexpr int kRows = decltype(size<1>(acc))::value;
    static_assert(kBlocks % kStep == 0, "a step's columns lie in one MMA");

    const int q = threadIdx.x & 3;
    HiddenStatistics seen;
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < kRows; ++mi) {
      const int r = get<0>(coords(make_coord(_0{}, _0{}, _0{}), mi, _0{})), m = m_tile + r;  // the other is r + 8
      const typename Terms::Row of_row[2] = {terms.rows[r], terms.rows[r + 8]};
      CUTLASS_PRAGMA_UNROLL
      for (int ni = 0; ni < size<2>(acc); ++ni) {
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kBlocks; step += kStep) {
          const int column = get<1>(coords(make_coord(_0{}, _0{}, step), mi, ni));  // of this lane, in the tile
          const int n = n_tile + column - 2 * q;
          uint32_t w[2][4] = {};
          CUTLASS_PRAGMA_UNROLL
          for (int first = 0; first < kStep; first += 4) {
            if ((step + first) % 8 == 0) asm volatile("" ::: "memory");  // as in epilogue_compress.cuh
            typename Terms::Columns of_columns[4];
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < 4; ++i) of_columns[i] = terms.columns[column / 2 + 4 * (first + i)];
            CUTLASS_PRAGMA_UNROLL
            for (int half = 0; half < 2; ++half) {
              CUTLASS_PRAGMA_UNROLL
              for (int i = 0; i < 4; ++i) {
                const int b = first + i;
                const float h0 =
                    acc(make_coord(_0{}, half, step + b), mi, ni) * of_row[half].scale * of_columns[i].scale[0];
                const float h1 =
                    acc(make_coord(_1{}, half, step + b), mi, ni) * of_row[half].scale * of_columns[i].scale[1];
                const uint32_t h = pack2(T{}, h0 + of_columns[i].shift[0], h1 + of_columns[i].shift[1]);
                const float y0 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h)));
                const float y1 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h >> 16)));
                const float inverse = kFp8 ? of_row[half].out_scale : 0.f;
                if constexpr (kStatistics) {
                  if (m + 8 * half < hidden.rows) {
                    seen.see(y0, inverse);
                    seen.see(y1, inverse);
                  }
                }
                if constexpr (kFp8) {
                  // Blocks 2i and 2i + 1 share word i.
                  const uint32_t pair = to_e4m3x2(__fmul_rn(y0, inverse), __fmul_rn(y1, inverse));
                  w[half][b / 2] |= pair << (16 * (b % 2));
                } else {
                  w[half][b] = pack2(T{}, y0, y1);
                }
              }
            }
          }
          CUTLASS_PRAGMA_UNROLL
          for (int half = 0; half < 2; ++half) store_row(w[half], m + 8 * half, n + kStep * 2 * q, q);
        }
      }
    }
    if constexpr (kStatistics) seen.collect(hidden);
  }

  // 16 bytes of one row, after the quad has traded words.
  CUTLASS_DEVICE void store_row(uint32_t (&w)[4], int m, int column, int q) const {
    transpose_quad(w, q);
    if (m >= p_.hidden.rows || column >= p_.hidden.cols) return;
    const int64_t index = int64_t(m) * p_.hidden.cols + column;
    if constexpr (kFp8) {
      store16(static_cast<uint8_t*>(p_.y) + index, __byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
              __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
    } else {
      store16(static_cast<T*>(p_.y) + index, w[0], w[1], w[2], w[3]);
    }
  }
};

}  // namespace sparse24::cuda
