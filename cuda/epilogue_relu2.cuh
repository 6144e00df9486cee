// The epilogue of linear_relu2: y = relu(h)^2, dense, straight from the accumulators.
//
// A lane's runs of features (lane_runs.cuh) are those that fill 16 bytes: 8 of 16 bits or 16 of fp8.
#pragma once

#include "epilogue_hidden.cuh"
#include "epilogue_steps.cuh"
#include "select24.cuh"

namespace sparse24::cuda {

// Arguments as the device sees them.
struct Relu2Params {
  HiddenParams hidden;
  void* y;
};

// T: the type that h is rounded to. kFp8: y is e4m3; otherwise T.
template <class T, bool kFp8, int kTileM, int kTileN>
class Relu2Epilogue : public HiddenEpilogue<Relu2Params, T, kTileM, kTileN, kFp8 ? 16 : 8, false> {
  using Base = HiddenEpilogue<Relu2Params, T, kTileM, kTileN, kFp8 ? 16 : 8, false>;
  using Base::h_, Base::p_, Base::seen_;

 public:
  using Base::Base;
  using typename Base::Runs, typename Base::Terms;

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
        const uint32_t root = magnitudes<T, Activation::kRelu2>(h_.of[b][half]);
        if constexpr (kFp8 || kCounts) {
          const float x0 = to_float(T{}, uint16_t(root)), x1 = to_float(T{}, uint16_t(root >> 16));
          const float y0 = __fmul_rn(x0, x0), y1 = __fmul_rn(x1, x1), inverse = inverse_scale_[half];
          if (kCounts && row_ + 8 * half < p_.hidden.rows) {
            seen_.see(y0, inverse);
            seen_.see(y1, inverse);
          }
          if constexpr (kFp8) {
            // Blocks 2i and 2i + 1 share word i.
            const uint32_t pair = to_e4m3x2(__fmul_rn(y0, inverse), __fmul_rn(y1, inverse));
            uint32_t& word = words_[half][b % kPerStore / 2];
            word = b % 2 ? __byte_perm(word, pair, 0x5410) : pair;
          }
        }
        if constexpr (!kFp8) words_[half][b % kPerStore] = square2<T>(root);
        if ((b + 1) % kPerStore == 0) store(words_[half], row_ + 8 * half, column_ + 8 * (b + 1 - kPerStore));
      }
    }
    this->template collect<kStep, kCounts>();
  }

 private:
  static constexpr int kPerStore = Runs::kBlock / 8;  // blocks of 8 columns

  // A run of one row: 16 bytes.
  CUTLASS_DEVICE void store(const uint32_t (&w)[4], int m, int n) const {
    const int column = n + Runs::kRun * (threadIdx.x & 3);
    if (m >= p_.hidden.rows || column >= p_.hidden.cols) return;
    const int64_t index = int64_t(m) * p_.hidden.cols + column;
    store16(static_cast<char*>(p_.y) + index * (kFp8 ? 1 : 2), w[0], w[1], w[2], w[3]);
  }

  int row_ = kNowhere, column_ = 0;  // of the first element of the upper row
  float inverse_scale_[2] = {};      // 0: y is not scaled
  uint32_t words_[2][4] = {};
};

}  // namespace sparse24::cuda
