/// @file
/// The loads of a K-major operand: what the copies of both CTAs of a cluster bring, by the dimensions of their tensor
/// maps, is every row of a tile or of a quarter of one, in the order that the epilogues count on, and zeros beyond the
/// operand.
#include <gtest/gtest.h>

#include <vector>

#include "gemm/sm90/mainloops/permuted_n_copies.cuh"

namespace sparse24::emulate {
namespace {

using cute::Int;

/// What PermutedNCopies asks of a mainloop.
template <class Element, int kN, int kClusterM, int kClusterN>
struct Mainloop {
  using ElementB = Element;
  using TileShape = cute::Shape<Int<128>, Int<kN>, Int<int(128 / sizeof(Element))>>;
  struct DispatchPolicy {
    using ClusterShape = cute::Shape<Int<kClusterM>, Int<kClusterN>, Int<1>>;
  };
};

template <class Mainloop_, int kRun>
struct Loads {
  using Mainloop = Mainloop_;
  using Permutation = cuda::PermutedN<kRun>;
};

/// One copy: a box at `at`, element by element, zeros where a coordinate is beyond its dimension.
template <class Rows, class Element>
void read(const Rows& rows, const int (&at)[5], Element* to) {
  const auto& d = rows.dims;
  for (int e = 0; e < d[4].box; ++e) {
    for (int p = 0; p < d[3].box; ++p) {
      for (int q = 0; q < d[2].box; ++q) {
        for (int r = 0; r < d[1].box; ++r) {
          for (int c = 0; c < d[0].box; ++c, ++to) {
            const int64_t x[] = {at[0] + c, at[1] + r, at[2] + q, at[3] + p, at[4] + e};
            bool inside = true;
            int64_t offset = 0;
            for (int i = 0; i < 5; ++i) {
              inside = inside && x[i] < d[i].size;
              offset += x[i] * d[i].stride;
            }
            *to = inside ? rows.start[offset] : Element{};
          }
        }
      }
    }
  }
}

template <class Case>
class PermutedNLoads : public testing::Test {};

using Cases = testing::Types<Loads<Mainloop<uint8_t, 256, 2, 1>, 8>, Loads<Mainloop<uint8_t, 256, 2, 1>, 16>,
                             Loads<Mainloop<uint16_t, 256, 2, 1>, 16>, Loads<Mainloop<uint8_t, 192, 2, 1>, 8>,
                             Loads<Mainloop<uint16_t, 64, 2, 1>, 8>, Loads<Mainloop<uint16_t, 128, 1, 2>, 16>,
                             Loads<Mainloop<uint16_t, 192, 2, 1>, 16>, Loads<Mainloop<uint8_t, 128, 1, 2>, 16>>;
TYPED_TEST_SUITE(PermutedNLoads, Cases);

/// kRows: of a tile, or of a part of one, which `index` counts.
template <class Copies, class Permutation, int kRows, int kTileK, class Element>
void expect_rows(const std::vector<Element>& w, int64_t ld, int n, int k, bool permuted, int index) {
  const auto layout = Copies::layout(w.data(), ld, n, k, permuted);
  const int column = (k - 1) / kTileK * kTileK;
  std::vector<Element> stage(kRows * kTileK, Element(0xEE));
  for (int rank = 0; rank < (Copies::kShared ? 2 : 1); ++rank) {
    Copies::template each<kRows>(layout.order, index, rank, [&](bool last, int to, int row, int pairs, int block) {
      const int at[] = {column, row, 0, pairs, block};
      read(last ? layout.last : layout.blocks, at, &stage[to * kTileK]);
    });
  }
  for (int r = 0; r < kRows; ++r) {
    const int row = index * kRows + (permuted ? Permutation::feature(r) : r);
    for (int c = 0; c < kTileK; ++c) {
      const Element expected = row < n && column + c < k ? w[row * ld + column + c] : Element{};
      ASSERT_EQ(stage[r * kTileK + c], expected) << "n " << n << ", k " << k << ", permuted " << permuted << ", "
                                                 << kRows << " rows, tile " << index << ", row " << r;
    }
  }
}

TYPED_TEST(PermutedNLoads, BringEveryRowOfATile) {
  using Mainloop = typename TypeParam::Mainloop;
  using Permutation = typename TypeParam::Permutation;
  using Element = typename Mainloop::ElementB;
  using Copies = cuda::PermutedNCopies<Mainloop, Permutation>;
  constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  for (const bool permuted : {true, false}) {
    for (const int n : {1, 7, 16, 48, 136, 264, 400, 512}) {
      if (permuted && n % Permutation::kRun != 0) continue;
      for (const int k : {1, 5, 96, 2047}) {
        const int64_t ld = k + 16;
        std::vector<Element> w(n * ld, Element(0xFF));  // behind the rows, never read
        for (int row = 0; row < n; ++row) {
          for (int c = 0; c < k; ++c) w[row * ld + c] = Element(1 + (row * 31 + c * 7) % 200);
        }
        for (int tile = 0; tile * kTileN < n + kTileN; ++tile) {
          expect_rows<Copies, Permutation, kTileN, kTileK>(w, ld, n, k, permuted, tile);
        }
        if constexpr (kTileN == 256) {  // its quarters
          for (int part = 0; part * 64 < n + 256; ++part) {
            expect_rows<Copies, Permutation, 64, kTileK>(w, ld, n, k, permuted, part);
          }
        }
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace sparse24::emulate
