// The epilogue of linear_relu2: y = relu(h)^2, dense, straight from the accumulators.
//
// 16-bit results of the fragment that epilogue_steps.cuh draws are transposed over the quad four blocks of 8 columns at
// a time, fp8 results eight, so that each lane stores 16 bytes of one row.
#pragma once

#include "epilogue_hidden.cuh"
#include "epilogue_steps.cuh"
#include "quad.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct Relu2Params {
  HiddenParams hidden;
  void* y;
};

// T: the type that h is rounded to. kFp8: y is e4m3; otherwise T.
template <class T, bool kFp8, int kTileM, int kTileN>
class Relu2Epilogue : public HiddenEpilogue<Relu2Params, T, kTileM, kTileN> {
  using Base = HiddenEpilogue<Relu2Params, T, kTileM, kTileN>;
  using Base::h_, Base::p_, Base::seen_;

 public:
  using Base::Base;
  using typename Base::Terms;

  template <class Fragment>
  CUTLASS_DEVICE void take(int m, int n, int row, Fragment const& acc, Terms const& terms) {
    row_ = m + row;
    column_ = n;
    if constexpr (kFp8) {
      inverse_scale_[0] = terms.rows[row].out_scale;
      inverse_scale_[1] = terms.rows[row + 8].out_scale;
    }
    h_.take(p_.hidden, row, acc, terms);
  }

  template <int kStep, bool kCounts>
  CUTLASS_DEVICE void finish() {
    CUTLASS_PRAGMA_UNROLL
    for (int b = 2 * kStep; b < 2 * kStep + 2; ++b) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t h = h_.of[b][half];
        const float y0 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h)));
        const float y1 = activate<Activation::kRelu2>(to_float(T{}, uint16_t(h >> 16)));
        const float inverse = inverse_scale_[half];
        if (kCounts && row_ + 8 * half < p_.hidden.rows) {
          seen_.see(y0, inverse);
          seen_.see(y1, inverse);
        }
        if constexpr (kFp8) {
          // Blocks 2i and 2i + 1 share word i.
          const uint32_t pair = to_e4m3x2(__fmul_rn(y0, inverse), __fmul_rn(y1, inverse));
          uint32_t& word = words_[half][b % kPerStore / 2];
          word = b % 2 ? word | pair << 16 : pair;
        } else {
          words_[half][b % kPerStore] = pack2(T{}, y0, y1);
        }
        if ((b + 1) % kPerStore == 0) store(words_[half], row_ + 8 * half, column_ + 8 * (b + 1 - kPerStore));
      }
    }
    this->template collect<kStep, kCounts>();
  }

 private:
  static constexpr int kPerStore = kFp8 ? 8 : 4;  // blocks whose columns of one row fill 4 x 16 bytes

  // 16 bytes of one row, after the quad has traded words.
  CUTLASS_DEVICE void store(uint32_t (&w)[4], int m, int n) const {
    const int q = threadIdx.x & 3, column = n + 2 * kPerStore * q;
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

  int row_ = kNowhere, column_ = 0;  // of the first element of the upper row
  float inverse_scale_[2] = {};      // 0: y is not scaled
  uint32_t words_[2][4] = {};
};

}  // namespace sparse24::cuda
