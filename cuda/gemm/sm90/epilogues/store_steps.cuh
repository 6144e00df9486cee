// The epilogue of mm in steps (epilogues/steps.cuh): D = scale_a * scale_b * acc + bias. It serves what the overlapped
// kernel is worth compiling for, rows of D or D.T of 16 bits that are stored in vectors (StoreParams::in_steps);
// epilogues/store.cuh serves everything.
//
// Blocks of 32 columns take two steps. Where B is K-major, lanes hold runs of 8 columns (epilogues/permuted_n.cuh), and
// a step stores those of row r or of row r + 8; elsewhere they trade for them first. Rows of D.T need both rows of the
// fragment, so that every second step stores them.
#pragma once

#include "common/packed.cuh"
#include "common/warp.cuh"
#include "gemm/sm90/epilogues/scale_accumulators.cuh"
#include "gemm/sm90/epilogues/steps.cuh"
#include "gemm/sm90/epilogues/store.cuh"

namespace sparse24::cuda {

struct StoreStepsParams {
  StoreParams store;
  int rows, cols;  // of D
};

// kPermutedN says that B is K-major and D row-major, so that the rows of B come in the permuted order.
template <int kTileM, int kTileN, bool kPermutedN>
class StoreSteps {
 public:
  using Params = StoreStepsParams;
  using Operands = EpilogueOperands<kTileM, kTileN>;
  static constexpr int kSteps = kTileN / 16;

  CUTLASS_DEVICE explicit StoreSteps(Params const& params) : p_(params) {}

  CUTLASS_HOST_DEVICE static int column_of(Params const&, int column) {
    return kPermutedN ? PermutedN<8>::feature(column) : column;
  }
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, int m, int n, Operands& operands) {
    fetch_store_operands(p.store, lane, p.rows, p.cols, m, n, [&](int c) { return column_of(p, c); }, operands);
  }
  CUTLASS_DEVICE bool is_general() const { return false; }

  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, Fragment const& acc, Scales& scales) {
    m_ = m + scales.row;
    n_ = n;
    if (p_.store.d_dtype == DType::kBFloat16) {
      convert<__nv_bfloat16>(acc, scales);
    } else {
      convert<__half>(acc, scales);
    }
  }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    constexpr int half = kStep % 2, kBlock = kStep / 2;
    if (!kPermutedN && p_.store.transposed) {
      if constexpr (half == 1) {
        uint32_t w[2][4];
        CUTLASS_PRAGMA_UNROLL
        for (int b = 0; b < 8; ++b) w[b / 4][b % 4] = words_[4 * kBlock + b % 4][b / 4];
        store_columns(p_.store, w, m_, n_ + 32 * kBlock + 2 * (threadIdx.x & 3), p_.rows, p_.cols);
      }
      return;
    }
    uint32_t w[4];
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < 4; ++b) w[b] = words_[4 * kBlock + b][half];
    if constexpr (!kPermutedN) transpose_quad(w, threadIdx.x & 3);
    const int m = m_ + 8 * half, n = n_ + 32 * kBlock + 8 * (threadIdx.x & 3);
    if (m < p_.rows && n < p_.cols) {
      store16(static_cast<uint16_t*>(p_.store.d) + uint64_t(uint32_t(m)) * uint64_t(p_.store.ldd) + n, w[0], w[1], w[2],
              w[3]);
    }
  }

 private:
  // Packs two columns into a word, of row r and of row r + 8.
  template <class T>
  struct Words {
    uint32_t (&of)[kTileN / 8][2];

    CUTLASS_DEVICE void pack(int b, float v00, float v01, float v10, float v11) {
      of[b][0] = pack2(T{}, v00, v01);
      of[b][1] = pack2(T{}, v10, v11);
    }
  };
  template <class T, class Fragment, class Scales>
  CUTLASS_DEVICE void convert(Fragment const& acc, Scales& scales) {
    Words<T> words{words_};
    if (p_.store.scale_a || p_.store.scale_b || p_.store.bias) return scales.template scale<kTileN / 8>(acc, words);
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kTileN / 8; ++b) words.pack(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
  }

  Params const& p_;
  int m_ = 1 << 30, n_ = 0;  // row r, and the tile's first column; at first no tile has them, and nothing is stored
  uint32_t words_[kTileN / 8][2] = {};
};

}  // namespace sparse24::cuda
