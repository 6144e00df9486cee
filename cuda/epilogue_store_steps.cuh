// The epilogue of mm in steps (epilogue_steps.cuh): D = scale_a * scale_b * acc + bias, for rows of 16 bits that are
// stored in vectors (StoreParams::in_runs).
//
// A lane's runs of 8 columns (lane_runs.cuh) are what fills 16 bytes: a step stores one of row r or of row r + 8.
#pragma once

#include "epilogue_steps.cuh"
#include "epilogue_store.cuh"

namespace sparse24::cuda {

struct StoreStepsParams {
  StoreParams store;
  int rows, cols;  // of D
};

template <int kTileM, int kTileN>
class StoreSteps {
 public:
  using Params = StoreStepsParams;
  using Runs = LaneRuns<8>;
  using Terms = TileTerms<kTileM, kTileN>;
  static constexpr int kSteps = kTileN / 16;

  CUTLASS_DEVICE explicit StoreSteps(Params const& params) : p_(params) {}

  CUTLASS_HOST_DEVICE static int column_of(Params const&, int column) { return Runs::feature(column); }
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, int m, int n, Terms& terms) {
    fetch_store_terms(p.store, lane, p.rows, p.cols, m, n, [](int c) { return Runs::feature(c); }, terms);
  }
  CUTLASS_DEVICE bool counts() const { return false; }

  template <class Fragment>
  CUTLASS_DEVICE void take(int m, int n, int row, Fragment const& acc, Terms const& terms) {
    const int column = n + 8 * (threadIdx.x & 3);
    d_ = static_cast<uint16_t*>(p_.store.d) + int64_t{m + row} * p_.store.ldd + column;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) left_[half] = m + row + 8 * half < p_.rows ? p_.cols - column : 0;
    if (p_.store.d_dtype == DType::kBFloat16) {
      convert<__nv_bfloat16>(row, acc, terms);
    } else {
      convert<__half>(row, acc, terms);
    }
  }

  template <int kStep, bool kCounts>
  CUTLASS_DEVICE void finish() {
    constexpr int half = kStep % 2, kBlock = kStep / 2, kFirst = 32 * kBlock;
    if (kFirst >= left_[half]) return;
    store16(d_ + kFirst + int64_t{8 * half} * p_.store.ldd, words_[4 * kBlock][half], words_[4 * kBlock + 1][half],
            words_[4 * kBlock + 2][half], words_[4 * kBlock + 3][half]);
  }

 private:
  template <class T, class Fragment>
  CUTLASS_DEVICE void convert(int row, Fragment const& acc, Terms const& terms) {
    if (!p_.store.scale_a && !p_.store.scale_b && !p_.store.bias) {
      CUTLASS_PRAGMA_UNROLL
      for (int b = 0; b < kTileN / 8; ++b) pack<T>(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
      return;
    }
    const int q = threadIdx.x & 3;
    const float scale_a[2] = {terms.rows[row].scale, terms.rows[row + 8].scale};
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kTileN / 8; ++b) {
      if (b % 8 == 0) asm volatile("" ::: "memory");  // keeps the reads of later columns out: registers
      const auto of_columns = terms.columns[4 * b + q];
      float v[4];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i)
        v[i] = acc(4 * b + i) * scale_a[i / 2] * of_columns.scale[i % 2] + of_columns.shift[i % 2];
      pack<T>(b, v[0], v[1], v[2], v[3]);
    }
  }
  // Two columns of row r, then of row r + 8.
  template <class T>
  CUTLASS_DEVICE void pack(int b, float v00, float v01, float v10, float v11) {
    words_[b][0] = pack2(T{}, v00, v01);
    words_[b][1] = pack2(T{}, v10, v11);
  }

  Params const& p_;
  uint16_t* d_ = nullptr;  // of the run of row r in the tile's first block
  int left_[2] = {};       // columns from the lane's first on
  uint32_t words_[kTileN / 8][2] = {};
};

}  // namespace sparse24::cuda
