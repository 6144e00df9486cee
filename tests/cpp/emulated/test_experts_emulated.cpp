/// @file
/// The schedule of experts: from any offsets each row is computed once for each column, by tiles of its expert alone,
/// in the padded rows that the format promises; and the copies of weights bring the rows of the expert.
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "emulator/block.h"
#include "emulator/intrinsics.h"
#include "gemm/sm90/mainloops/expert_columns.cuh"
#include "gemm/sm90/mainloops/expert_rows.cuh"
#include "gemm/sm90/schedulers/expert_scheduler.cuh"
#include "gemm/sm90/schedulers/over_rows_scheduler.cuh"

namespace sparse24::emulate {
namespace {

using cuda::ExpertScheduler;
using cute::Int;

constexpr int kThreads = 64;

struct Table {
  std::vector<int32_t> offsets;
  ExpertScheduler::Params params;
  std::unique_ptr<ExpertScheduler::Shared> shared = std::make_unique<ExpertScheduler::Shared>();

  Table(std::vector<int32_t> of, int rows, int columns, int multiprocessors = 132)
      : offsets(std::move(of)),
        params(ExpertScheduler::params({rows, columns, int(offsets.size()), 128, 256, offsets.data()}, GemmConfig{},
                                       multiprocessors)) {
    blockDim.x = kThreads;
    Block(0, kThreads, Order::kInTurn).run([&] { ExpertScheduler::fill(params, *shared); });
  }
};

/// What the table has to hold, by a loop.
void expect_table(const Table& table) {
  int row = 0, tiles = 0, clusters = 0;
  for (size_t e = 0; e < table.offsets.size(); ++e) {
    ASSERT_EQ(table.shared->rows[e], row);
    ASSERT_EQ(table.shared->tiles[e], tiles);
    ASSERT_EQ(table.shared->clusters[e], clusters);
    const int end = std::max(row, std::min(table.offsets[e], table.params.rows)), of = (end - row + 127) / 128;
    row = end;
    tiles += of;
    clusters += of / 2 * table.params.tiles_n + of % 2 * ((table.params.tiles_n + 1) / 2);
  }
  ASSERT_EQ(table.shared->rows[table.offsets.size()], row);
  ASSERT_EQ(table.shared->tiles[table.offsets.size()], tiles);
  ASSERT_EQ(table.shared->clusters[table.offsets.size()], clusters);
  ASSERT_LE(tiles * 128, Experts::padded_rows(table.params.rows, table.params.experts));
}

void expect_every_row_once(const Table& table) {
  std::set<std::pair<int, int>> seen;  // row, column of tiles
  const uint32_t ctas = ExpertScheduler::grid(table.params).x;
  for (uint32_t cta = 0; cta < ctas; cta += 2) {
    const ExpertScheduler one(table.params, *table.shared, cta), other(table.params, *table.shared, cta + 1);
    for (uint32_t i = one.first(); one.has_tile(i); i += one.stride()) {
      ASSERT_TRUE(other.has_tile(i + 1));
      const cuda::ExpertPlace at[] = {one.tile(i), other.tile(i + 1)};
      // CTAs of a cluster have one expert: tiles below each other, or beside.
      EXPECT_EQ(at[0].expert, at[1].expert);
      EXPECT_EQ(at[0].shares_columns, at[1].shares_columns);
      if (at[0].shares_columns) {
        EXPECT_EQ(at[0].n, at[1].n);
        EXPECT_EQ(at[0].row + 128, at[1].row);
      } else {
        EXPECT_EQ(at[0].n + 1, at[1].n);
        EXPECT_EQ(at[0].row, at[1].row);
      }
      for (const auto& place : at) {
        if (place.n >= table.params.tiles_n) {
          EXPECT_EQ(place.rows(), 0);
          continue;
        }
        EXPECT_GT(place.rows(), 0);
        const int begin = table.shared->rows[place.expert];
        EXPECT_EQ((place.row - begin) % 128, 0);
        EXPECT_EQ(place.padded_row, table.shared->tiles[place.expert] * 128 + place.row - begin);
        EXPECT_EQ(place.end, table.shared->rows[place.expert + 1]);
        for (int row = place.row; row < std::min(place.row + 128, place.end); ++row)
          ASSERT_TRUE(seen.emplace(row, place.n).second) << row << ", " << place.n;
      }
    }
  }
  EXPECT_EQ(seen.size(), size_t(table.shared->rows[table.offsets.size()]) * size_t(table.params.tiles_n));
}

void expect_schedule(std::vector<int32_t> offsets, int rows, int columns, int multiprocessors = 132) {
  const Table table(std::move(offsets), rows, columns, multiprocessors);
  expect_table(table);
  expect_every_row_once(table);
}

TEST(ExpertScheduler, ComputesEveryRowOnce) {
  expect_schedule({300}, 300, 700);
  expect_schedule({0, 0, 0}, 10, 256);              // all of no expert
  expect_schedule({0, 5, 5, 133, 134}, 134, 300);   // empty ones, ones of one row
  expect_schedule({0, 0, 5000, 5000}, 5003, 1856);  // all on one; rows behind the last
  expect_schedule({128, 384, 385}, 400, 256, 5);
}

TEST(ExpertScheduler, TakesOffsetsThatDoNotAscendForThoseBefore) {
  expect_schedule({200, 100, -5, 250, 9000, 10}, 300, 256);
  const Table table({200, 100, -5, 250, 9000, 10}, 300, 256);
  EXPECT_EQ(table.shared->rows[6], 300);
  std::vector<int32_t> many(100, 50);  // more than a warp scans at a time
  many[20] = 200;
  expect_schedule(many, 300, 256);
}

TEST(ExpertScheduler, ComputesEveryRowOnceOfRandomOffsets) {
  std::mt19937 random(7);
  for (int round = 0; round < 40; ++round) {
    const int experts = 1 + int(random() % (round % 4 == 0 ? 300 : 40));
    std::vector<int32_t> offsets;
    int end = 0;
    for (int e = 0; e < experts; ++e) {
      if (random() % 3 != 0) end += int(random() % (random() % 5 == 0 ? 900 : 40));
      offsets.push_back(end);
    }
    expect_schedule(offsets, end + int(random() % 200), 8 * (1 + int(random() % 150)), 2 + int(random() % 140));
    if (HasFatalFailure()) return;
  }
}

TEST(ExpertScheduler, TakesAsManyExpertsAsItSays) {
  std::vector<int32_t> offsets;
  for (int e = 0; e < kMostExperts; ++e) offsets.push_back(3 * e);
  expect_schedule(offsets, 3 * int(kMostExperts), 64);
}

/// The tile of an expert before and behind the last of its pairs, as schedulers/expert_scheduler.cuh draws it.
TEST(ExpertScheduler, PutsTheLastOfAnOddNumberOfTilesBeside) {
  const Table table({640}, 640, 4 * 256, 132);
  const ExpertScheduler even(table.params, *table.shared, 0), odd(table.params, *table.shared, 1);
  EXPECT_EQ(table.shared->clusters[1], 10);
  EXPECT_EQ(even.tile(0).row, 0);
  EXPECT_EQ(odd.tile(1).row, 128);
  EXPECT_EQ(even.tile(2 * 1).row, 256);  // groups of pairs, walked along N
  EXPECT_EQ(even.tile(2 * 2).n, 1);
  EXPECT_EQ(even.tile(2 * 8).row, 512);
  EXPECT_EQ(odd.tile(2 * 8 + 1).n, 1);
  EXPECT_FALSE(even.tile(2 * 8).shares_columns);
}

/// d has every row of every expert once for each column of tiles, and each tile the rows of its expert to sum over.
void expect_products_over_rows(std::vector<int32_t> offsets, int rows, int m, int n, int multiprocessors = 132) {
  using Scheduler = cuda::OverRowsScheduler;
  const int experts = int(offsets.size());
  const auto params = Scheduler::params({m, n, experts, 128, 192, offsets.data(), rows}, GemmConfig{}, multiprocessors);
  const Table table(offsets, rows, n);
  std::set<std::pair<int, int>> seen;
  for (uint32_t cta = 0; cta < Scheduler::grid(params).x; cta += 2) {
    const Scheduler one(params, *table.shared, cta), other(params, *table.shared, cta + 1);
    for (uint32_t i = one.first(); one.has_tile(i); i += one.stride()) {
      ASSERT_TRUE(other.has_tile(i + 1));
      // CTAs of a cluster give stages back to each other: they need as many.
      ASSERT_EQ(one.k_rows(i), other.k_rows(i + 1));
      for (const auto& at : {one.tile(i), other.tile(i + 1)}) {
        EXPECT_EQ(at.k_row, table.shared->rows[at.expert]);
        EXPECT_EQ(at.k_row + one.k_rows(i), table.shared->rows[at.expert + 1]);
        EXPECT_EQ(at.row, at.expert * m + at.column);
        for (int row = at.row; row < std::min(at.row + 128, at.end); ++row)
          ASSERT_TRUE(seen.emplace(row, at.n).second) << row << ", " << at.n;
      }
      if (one.tile(i).shares_columns) {
        EXPECT_EQ(one.tile(i).n, other.tile(i + 1).n);
      }
    }
  }
  EXPECT_EQ(seen.size(), size_t(experts) * size_t(m) * size_t((n + 191) / 192));
}

TEST(OverRowsScheduler, ComputesEveryRowOnce) {
  expect_products_over_rows({300}, 300, 700, 400);
  expect_products_over_rows({0, 5, 5, 133, 134}, 140, 1856, 8);
  expect_products_over_rows({200, 100, -5, 250, 9000, 10}, 300, 136, 2688, 5);
}

/// What ExpertRows asks of a mainloop.
template <class Element, int kN>
struct Mainloop {
  using ElementB = Element;
  using TileShape = cute::Shape<Int<128>, Int<kN>, Int<int(128 / sizeof(Element))>>;
  struct DispatchPolicy {
    using ClusterShape = cute::Shape<Int<2>, Int<1>, Int<1>>;
  };
};

template <class Mainloop_, int kRun>
struct Loads {
  using Mainloop = Mainloop_;
  using Permutation = cuda::PermutedN<kRun>;
};

/// One copy: a box at `at`, element by element, zeros where a coordinate is beyond its dimension.
template <class Rows, class Element>
void read(const Rows& rows, const int (&at)[5], const std::vector<Element>& all, Element* to) {
  const auto& d = rows.dims;
  for (int p = 0; p < d[3].box; ++p) {
    for (int q = 0; q < d[2].box; ++q) {
      for (int r = 0; r < d[1].box; ++r) {
        for (int c = 0; c < d[0].box; ++c, ++to) {
          const int64_t x[] = {at[0] + c, at[1] + r, at[2] + q, at[3] + p, at[4]};
          bool inside = true;
          int64_t offset = rows.start - all.data();
          for (int i = 0; i < 5; ++i) {
            inside = inside && x[i] < d[i].size;
            offset += x[i] * d[i].stride;
          }
          if (inside) {
            ASSERT_LT(offset, int64_t(all.size()));
          }
          *to = inside ? all[size_t(offset)] : Element{};
        }
      }
    }
  }
}

template <class Case>
class ExpertLoads : public testing::Test {};

using Cases = testing::Types<Loads<Mainloop<uint16_t, 256>, 16>, Loads<Mainloop<uint16_t, 192>, 16>,
                             Loads<Mainloop<uint16_t, 256>, 8>, Loads<Mainloop<uint16_t, 192>, 8>,
                             Loads<Mainloop<uint8_t, 192>, 16>, Loads<Mainloop<uint8_t, 256>, 8>>;
TYPED_TEST_SUITE(ExpertLoads, Cases);

TYPED_TEST(ExpertLoads, BringTheRowsOfAnExpert) {
  using Mainloop = typename TypeParam::Mainloop;
  using Permutation = typename TypeParam::Permutation;
  using Element = typename Mainloop::ElementB;
  using Rows = cuda::ExpertRows<Mainloop, Permutation>;
  constexpr int kTileN = cute::size<1>(typename Mainloop::TileShape{});
  constexpr int kTileK = cute::size<2>(typename Mainloop::TileShape{});
  constexpr int kExperts = 3, kK = 48;
  for (const int n : {16, 48, 64, 208, 256, 400}) {
    std::vector<Element> w(size_t(kExperts * n * kK));
    for (size_t i = 0; i < w.size(); ++i) w[i] = Element(1 + i * 31 % 251);
    const auto layout = Rows::layout(w.data(), n, kK, kExperts);
    for (int expert = 0; expert < kExperts; ++expert) {
      for (int tile = 0; tile * kTileN < n; ++tile) {
        for (const bool shared : {true, false}) {
          std::vector<Element> stage(kTileN * kTileK, Element(0xEE));
          for (int rank = 0; rank < (shared ? 2 : 1); ++rank) {
            const auto one = [&](bool last, int to, int pair, int outermost) {
              const int at[] = {0, 0, 0, pair, outermost};
              read(last ? layout.last : layout.blocks, at, w, &stage[size_t(to * kTileK)]);
            };
            const auto of = Rows::tile(layout.order, tile, expert, rank);
            if (shared && of.in_whole) Rows::template each<true, true>(layout.order, of, one);
            if (shared && !of.in_whole) Rows::template each<true, false>(layout.order, of, one);
            if (!shared && of.in_whole) Rows::template each<false, true>(layout.order, of, one);
            if (!shared && !of.in_whole) Rows::template each<false, false>(layout.order, of, one);
          }
          for (int r = 0; r < kTileN; ++r) {
            const int row = tile * kTileN + Permutation::feature(r);
            for (int c = 0; c < kTileK; ++c) {
              const Element expected = row < n && c < kK ? w[size_t((expert * n + row) * kK + c)] : Element{};
              ASSERT_EQ(stage[size_t(r * kTileK + c)], expected)
                  << "n " << n << ", expert " << expert << ", tile " << tile << ", shared " << shared << ", row " << r;
            }
          }
        }
      }
    }
  }
}

/// Blocks of 64 columns, in each the 64 rows of the K tile.
TEST(ExpertColumns, BringTheColumnsOfAnExpert) {
  constexpr int kTileN = 192, kTileK = 64, kExperts = 3;
  using Columns = cuda::ExpertColumns<Mainloop<uint16_t, kTileN>>;
  for (const int n : {8, 192, 200}) {
    for (const int k : {16, 64, 104}) {
      std::vector<uint16_t> w(size_t(kExperts * n * k));
      for (size_t i = 0; i < w.size(); ++i) w[i] = uint16_t(1 + i % 65000);
      const auto& dims = Columns::layout(n, k, kExperts).dims;
      for (const bool shared : {true, false}) {
        const int expert = 1, tile = (n - 1) / kTileN, first = (k - 1) / kTileK * kTileK;
        std::vector<uint16_t> stage(kTileN * kTileK, 0xEEEE);
        for (int rank = 0; rank < (shared ? 2 : 1); ++rank) {
          const auto one = [&](int to, int column, int row) {
            for (int r = 0; r < dims[1].box; ++r) {
              for (int c = 0; c < dims[0].box; ++c) {
                const int64_t at[] = {tile * kTileN + column + c, first + row + r, expert};
                const bool inside = at[0] < dims[0].size && at[1] < dims[1].size && at[2] < dims[2].size;
                const int64_t offset = at[0] * dims[0].stride + at[1] * dims[1].stride + at[2] * dims[2].stride;
                stage[size_t(to + r * dims[0].box + c)] = inside ? w[size_t(offset)] : 0;
              }
            }
          };
          shared ? Columns::each<true>(rank, one) : Columns::each<false>(rank, one);
        }
        for (int c = 0; c < kTileN; ++c) {
          for (int r = 0; r < kTileK; ++r) {
            const int column = tile * kTileN + c, row = first + r;
            const uint16_t expected = column < n && row < k ? w[size_t((expert * k + row) * n + column)] : 0;
            ASSERT_EQ(stage[size_t(c / 64 * 64 * kTileK + r * 64 + c % 64)], expected) << column << ", " << row;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace sparse24::emulate
