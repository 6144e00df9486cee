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
template <class T, bool kFp8>
class Relu2Epilogue : public EpilogueBase<Relu2Params> {
 public:
  using EpilogueBase<Relu2Params>::EpilogueBase;

  template <class Problem, class BlockShape, class BlockCoord, class Engine, class Layout, class TiledMma,
            class Residue>
  CUTLASS_DEVICE void operator()(Problem const&, BlockShape const& block_shape, BlockCoord const& block_coord,
                                 cute::Tensor<Engine, Layout> const& acc, TiledMma tiled_mma, Residue const&,
                                 int thread_idx, char*) {
    using namespace cute;
    const HiddenParams& hidden = p_.hidden;
    const auto coords = tiled_mma.get_slice(thread_idx).partition_C(make_identity_tensor(take<0, 2>(block_shape)));
    const int m_tile = get<0>(block_coord) * size<0>(block_shape);
    const int n_tile = get<1>(block_coord) * size<1>(block_shape);
    constexpr int kBlocks = decltype(size<0, 2>(acc))::value;
    constexpr int kStep = kFp8 ? 8 : 4;  // blocks whose columns of one row fill 4 x 16 bytes
    static_assert(kBlocks % kStep == 0, "a step's columns lie in one MMA");

    const int q = threadIdx.x & 3;
    const bool statistics = hidden.amax || hidden.saturated;
    HiddenStatistics seen;
    CUTLASS_PRAGMA_UNROLL
    for (int mi = 0; mi < size<1>(acc); ++mi) {
      const int m = m_tile + get<0>(coords(make_coord(_0{}, _0{}, _0{}), mi, _0{}));  // row r; the other is r + 8
      const float scale_x[2] = {hidden.row_scale_x(m), hidden.row_scale_x(m + 8)};
      const float inverse_scale[2] = {kFp8 ? hidden.row_inverse_scale_y(m) : 0.f,
                                      kFp8 ? hidden.row_inverse_scale_y(m + 8) : 0.f};
      CUTLASS_PRAGMA_UNROLL
      for (int ni = 0; ni < size<2>(acc); ++ni) {
        CUTLASS_PRAGMA_UNROLL
        for (int step = 0; step < kBlocks; step += kStep) {
          const int n = n_tile + get<1>(coords(make_coord(_0{}, _0{}, step), mi, ni)) - 2 * q;
          uint32_t w[2][4] = {};
          CUTLASS_PRAGMA_UNROLL
          for (int first = 0; first < kStep; first += 4) {
            asm volatile("" ::: "memory");  // keeps the loads of later columns out: registers
            float scale[4][2], shift[4][2];
            hidden.load_columns<T>(n + 8 * first + 2 * q, scale, shift);
            CUTLASS_PRAGMA_UNROLL
            for (int half = 0; half < 2; ++half) {
              CUTLASS_PRAGMA_UNROLL
              for (int i = 0; i < 4; ++i) {
                const int b = first + i;
                const float h0 = acc(make_coord(_0{}, half, step + b), mi, ni) * scale_x[half] * scale[i][0];
                const float h1 = acc(make_coord(_1{}, half, step + b), mi, ni) * scale_x[half] * scale[i][1];
                const uint32_t h = pack2(T{}, h0 + shift[i][0], h1 + shift[i][1]);
                const float y0 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h)));
                const float y1 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h >> 16)));
                if (statistics && m + 8 * half < hidden.rows) {
                  seen.see(y0, inverse_scale[half]);
                  seen.see(y1, inverse_scale[half]);
                }
                if constexpr (kFp8) {
                  // Blocks 2i and 2i + 1 share word i.
                  const uint32_t pair =
                      to_e4m3x2(__fmul_rn(y0, inverse_scale[half]), __fmul_rn(y1, inverse_scale[half]));
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
    if (statistics) seen.collect(hidden);
  }

 private:
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
