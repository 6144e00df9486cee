// The epilogue of linear_relu2: y = relu(h)^2, dense, straight from the accumulators.
//
// A lane's runs of features (epilogues/permuted_n.cuh) are those that fill 16 bytes: 8 of 16 bits or 16 of fp8.
#pragma once

#include "common/float8.cuh"
#include "common/packed.cuh"
#include "gemm/sm90/epilogues/linear.cuh"
#include "gemm/sm90/epilogues/steps.cuh"

namespace sparse24::cuda {

// LinearRelu2Args as the device sees them.
struct Relu2Params {
  LinearParams linear;
  void* y;
};

// h is rounded to T; y is e4m3 with kFp8, and T without.
template <class T, bool kFp8, int kTileM, int kTileN>
class Relu2Epilogue : public LinearEpilogue<Relu2Params, T, kTileM, kTileN, kFp8 ? 16 : 8, false> {
  using Base = LinearEpilogue<Relu2Params, T, kTileM, kTileN, kFp8 ? 16 : 8, false>;
  using Base::h_, Base::inverse_scale_, Base::p_, Base::seen_;

 public:
  using Base::Base;
  using typename Base::Permutation;
  template <int kColumns>
  using WithColumns = Relu2Epilogue<T, kFp8, kTileM, kColumns>;

  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, Fragment const& acc, Scales& scales) {
    begin(m, n, p_.linear.rows, acc, scales);
    this->see_largest();
  }
  // rows: where those of h end. Of them no statistics are wanted.
  template <class Fragment, class Scales>
  CUTLASS_DEVICE void begin(int m, int n, int rows, Fragment const& acc, Scales& scales) {
    y_ = static_cast<char*>(p_.y) + this->template locate<kFp8>(m, n, rows, scales) * kBytes;
    h_.take(p_.linear, acc, scales);
  }
  CUTLASS_DEVICE void forget() { Base::forget(); }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    constexpr int kInBlock = kStep % kStepsPerBlock, kFirst = 16 * (kStep - kInBlock);  // column of the block
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t root[2] = {h_.of[2 * kStep][half], h_.of[2 * kStep + 1][half]};
      float y[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) y[i] = this->template activated<kGeneral>(root[i / 2], i % 2);
      const float inverse = inverse_scale_[half];
      if (kGeneral && this->exists(kFirst, half)) {
        CUTLASS_PRAGMA_UNROLL
        for (float v : y) seen_.see(v, inverse);
      }
      uint32_t (&w)[4] = words_[half];
      if constexpr (kFp8) {
        w[kInBlock] = pack16(to_e4m3x2(__fmul_rn(y[0], inverse), __fmul_rn(y[1], inverse)),
                             to_e4m3x2(__fmul_rn(y[2], inverse), __fmul_rn(y[3], inverse)));
      } else {
        w[2 * kInBlock] = this->template activated2<kGeneral>(root[0]);
        w[2 * kInBlock + 1] = this->template activated2<kGeneral>(root[1]);
      }
      if (kInBlock == kStepsPerBlock - 1 && this->exists(kFirst, half)) {  // 16 bytes are complete
        store16(y_ + (kFirst + uint64_t(8 * half) * uint32_t(p_.linear.cols)) * kBytes, w[0], w[1], w[2], w[3]);
      }
    }
    this->template collect<kStep>();
  }

 private:
  static constexpr int kBytes = kFp8 ? 1 : 2, kStepsPerBlock = Permutation::kBlock / 16;

  char* y_ = nullptr;  // where the run of row r in the tile's first block lies
  uint32_t words_[2][4] = {};
};

}  // namespace sparse24::cuda
