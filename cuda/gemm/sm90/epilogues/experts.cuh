// The epilogues of products of experts, in steps (epilogues/steps.cuh). They take a tile by its place: its first row
// and where its expert's rows end, which only the device knows, its expert, and its first padded row.
//
// A warpgroup without rows multiplies nothing: it calls forget() instead of begin(), and its visits store nothing.
#pragma once

#include "gemm/sm90/epilogues/linear.cuh"
#include "gemm/sm90/epilogues/steps.cuh"
#include "gemm/sm90/epilogues/store.cuh"

namespace sparse24::cuda {

// The epilogue of linear_relu2 or linear_compress for experts. kPadded: y has the padded rows.
template <class Base, bool kPadded>
class ExpertsLinearEpilogue : public Base {
 public:
  using Base::Base;
  using typename Base::Operands;
  using typename Base::Params;

  template <class Place>
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, Place const& at, Operands& operands) {
    LinearParams of_expert = p.linear;
    of_expert.rows = at.end;
    if (of_expert.scale_w) of_expert.scale_w += int64_t(at.expert) * (of_expert.scale_w_stride ? of_expert.cols : 1);
    of_expert.template fetch<typename Base::Hidden, typename Base::Permutation>(lane, at.row, at.n * Operands::kN,
                                                                                operands);
  }
  template <class Place, class Fragment, class Scales>
  CUTLASS_DEVICE void begin(Place const& at, Fragment const& acc, Scales& scales) {
    const int first = kPadded ? at.padded_row : at.row;
    Base::begin(first, at.n * Operands::kN, first + at.rows(), acc, scales);
  }
  // Rows of no expert: nobody reads them.
  CUTLASS_DEVICE static void clear(Params const&, int /*lane*/, int /*first*/, int /*stride*/) {}
};

// ExpertsProduct as the device sees it.
struct ExpertsStoreParams {
  void* d;
  DType d_dtype;
  int rows, cols;
  const float* scale_a;
  const float* scale_w;
  const float* row_scale;
  int scale_a_stride;  // 0: one element
  int scale_w_stride;
};

// D = row_scale * scale_a * scale_w * acc, in rows of 16 bits. A step stores 32 columns of row r or of row r + 8. Where
// w is K-major, lanes hold runs of 8 columns (epilogues/permuted_n.cuh); elsewhere they trade for them first. kPadded:
// scale_a has the padded rows.
template <int kTileM, int kTileN, bool kPadded, bool kPermutedN = true>
class ExpertsStoreEpilogue {
 public:
  using Params = ExpertsStoreParams;
  using Operands = EpilogueOperands<kTileM, kTileN>;
  using Permutation = PermutedN<8>;
  static constexpr int kSteps = kTileN / 16;

  CUTLASS_DEVICE explicit ExpertsStoreEpilogue(Params const& params) : p_(params) {}

  template <class Place>
  CUTLASS_DEVICE static void fetch(Params const& p, int lane, Place const& at, Operands& operands) {
    const auto row = [&](int i) {
      typename Operands::Row out{1.f, 1.f};
      if (i >= at.rows()) return out;
      if (p.scale_a) out.scale = p.scale_a[int64_t((kPadded ? at.padded_row : at.row) + i) * p.scale_a_stride];
      if (p.row_scale) out.scale *= p.row_scale[at.row + i];
      return out;
    };
    const auto columns = [&](int i) {
      typename Operands::Columns out{{1.f, 1.f}, {0.f, 0.f}};
      if (!p.scale_w) return out;
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int in_tile = kPermutedN ? Permutation::feature(i + c) : i + c;
        const int column = min(at.n * kTileN + in_tile, p.cols - 1);
        out.scale[c] = p.scale_w[p.scale_w_stride ? int64_t(at.expert) * p.cols + column : at.expert];
      }
      return out;
    };
    operands.fetch(lane, row, columns);
  }
  CUTLASS_DEVICE bool is_general() const { return false; }

  template <class Place, class Fragment, class Scales>
  CUTLASS_DEVICE void begin(Place const& at, Fragment const& acc, Scales& scales) {
    const int column = at.n * kTileN + 8 * (threadIdx.x & 3);
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) left_[half] = scales.row + 8 * half < at.rows() ? p_.cols - column : 0;
    d_ = static_cast<uint16_t*>(p_.d) + uint64_t(uint32_t(at.row + scales.row)) * uint32_t(p_.cols) + column;
    if (p_.d_dtype == DType::kBFloat16) {
      convert<__nv_bfloat16>(acc, scales);
    } else {
      convert<__half>(acc, scales);
    }
  }
  CUTLASS_DEVICE void forget() { left_[0] = left_[1] = 0; }

  template <int kStep, bool kGeneral>
  CUTLASS_DEVICE void visit() {
    constexpr int half = kStep % 2, kBlock = kStep / 2;
    uint32_t w[4];
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < 4; ++b) w[b] = words_[4 * kBlock + b][half];
    if constexpr (!kPermutedN) transpose_quad(w, threadIdx.x & 3);
    if (32 * kBlock >= left_[half]) return;
    store16(d_ + uint64_t(8 * half) * uint32_t(p_.cols) + 32 * kBlock, w[0], w[1], w[2], w[3]);
  }

  // Lets a warp write zeros to some of the rows of no expert, from `first` on.
  CUTLASS_DEVICE static void clear(Params const& p, int lane, int first, int stride) {
    for (int row = first; row < p.rows; row += stride) {
      auto* d = static_cast<uint16_t*>(p.d) + uint64_t(uint32_t(row)) * uint32_t(p.cols);
      for (int column = 8 * lane; column < p.cols; column += 8 * 32) store16(d + column, 0u, 0u, 0u, 0u);
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
    if (p_.scale_a || p_.scale_w || p_.row_scale) return scales.template scale<kTileN / 8>(acc, words);
    CUTLASS_PRAGMA_UNROLL
    for (int b = 0; b < kTileN / 8; ++b) words.pack(b, acc(4 * b), acc(4 * b + 1), acc(4 * b + 2), acc(4 * b + 3));
  }

  Params const& p_;
  uint16_t* d_ = nullptr;  // the lane's first column of row r
  int left_[2] = {};       // columns from there on, in rows r and r + 8; at first no tile has them
  uint32_t words_[kTileN / 8][2] = {};
};

}  // namespace sparse24::cuda
