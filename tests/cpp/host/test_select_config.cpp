/// @file
/// The choice of a GEMM configuration: a pure function that needs no device.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "sparse24/error.h"
#include "sparse24/linear.h"
#include "sparse24/linear_gradient.h"
#include "sparse24/mm.h"
#include "sparse24/packed.h"

namespace sparse24 {
namespace {

bool same_kernel(const GemmConfig& a, const GemmConfig& b) {
  return a.tile == b.tile && a.tile_m == b.tile_m && a.tile_n == b.tile_n && a.tile_k == b.tile_k &&
         a.cluster_m == b.cluster_m;
}

class SelectConfig : public testing::TestWithParam<DType> {
 protected:
  const std::vector<GemmConfig> compiled_ = mm_configs(GetParam());
  GemmConfig select(int64_t m, int64_t n, int64_t k, int sm_count = 132) const {
    return select_mm_config(GetParam(), m, n, k, sm_count);
  }
};

TEST_P(SelectConfig, ChoosesACompiledKernel) {
  for (int64_t m : {1, 63, 129, 512, 8191, 65536}) {
    for (int64_t n : {1, 7, 768, 4096, 65536}) {
      for (int64_t k : {16, 1856, 15680, 65536}) {
        for (int sm_count : {1, 78, 114, 132}) {
          const GemmConfig c = select(m, n, k, sm_count);
          ASSERT_TRUE(
              std::any_of(compiled_.begin(), compiled_.end(), [&](auto& other) { return same_kernel(c, other); }))
              << to_string(c) << " for " << m << " x " << n << " x " << k << " on " << sm_count;
          ASSERT_GE(c.swizzle, 1);
        }
      }
    }
  }
}

TEST_P(SelectConfig, IsDeterministic) {
  for (int64_t m : {1, 300, 8192}) EXPECT_EQ(to_string(select(m, 4096, 16384)), to_string(select(m, 4096, 16384)));
}

TEST_P(SelectConfig, FewTokensTakeEnoughMultiprocessorsToReadB) {
  for (int64_t m : {1, 16, 64, 128, 512}) {
    const GemmConfig c = select(m, 4096, 16384);
    const int64_t clusters = ceil_div(m, c.tile_m * c.cluster_m) * ceil_div(4096, c.tile_n) * c.splits;
    EXPECT_GE(clusters * c.cluster_m, 64) << to_string(c) << " for " << m << " tokens";
    EXPECT_LE(clusters * c.cluster_m, 132) << to_string(c) << " for " << m << " tokens: a second wave";
  }
}

TEST_P(SelectConfig, ManyTokensTakeALargeTile) {
  for (int64_t m : {8192, 16384}) {
    const GemmConfig c = select(m, 4096, 16384);
    EXPECT_GE(c.tile_m * c.tile_n, 128 * 256) << to_string(c);
  }
}

TEST_P(SelectConfig, FewTokensSplitKIntoWholeTiles) {
  for (int64_t m : {1, 128, 512}) {
    for (int64_t k : {16384, 15680, 1856}) {
      const GemmConfig c = select(m, 4096, k);
      EXPECT_TRUE(splits_evenly(c, k, c.splits)) << to_string(c) << " for K " << k;
      EXPECT_LE(c.splits, kMostSplits);
    }
  }
  EXPECT_GT(select(128, 1664, 6656).splits, 1);
}

TEST_P(SelectConfig, ManyTokensDoNotSplit) {
  for (int64_t m : {8192, 65536}) EXPECT_EQ(select(m, 4096, 16384).splits, 1);
}

TEST_P(SelectConfig, WithoutARoomForItNothingIsSplit) {
  EXPECT_EQ(select_mm_config(GetParam(), 128, 4096, 16384, 132, /*may_split=*/false).splits, 1);
}

TEST_P(SelectConfig, PartsAreWholeTiles) {
  const GemmConfig c = compiled_.front();
  EXPECT_TRUE(splits_evenly(c, 3 * c.tile_k, 3));
  EXPECT_FALSE(splits_evenly(c, 3 * c.tile_k, 2));
  EXPECT_TRUE(splits_evenly(c, 1000, 1));
  EXPECT_FALSE(splits_evenly(c, int64_t{16} * c.tile_k, 16));
}

TEST_P(SelectConfig, TheTileReadsWholeMetadataAtoms) {
  for (const GemmConfig& c : compiled_) EXPECT_EQ(c.tile_k, meta_atom_k(GetParam()));
}

TEST_P(SelectConfig, CompiledKernelsHaveDifferentNames) {
  std::set<std::string> names;
  for (const GemmConfig& c : compiled_) names.insert(to_string(c));
  EXPECT_EQ(names.size(), compiled_.size());
  EXPECT_GE(names.size(), 2u);
}

TEST_P(SelectConfig, TheNumbersOfATileMatchItsName) {
  for (const GemmConfig& c : compiled_) {
    const std::string tile = std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n);
    const char* name = c.tile == GemmTile::k128x256   ? "128x256"
                       : c.tile == GemmTile::k256x192 ? "256x192"
                       : c.tile == GemmTile::k128x128 ? "128x128"
                       : c.tile == GemmTile::k64x128  ? "64x128"
                                                      : "64x64";
    EXPECT_EQ(tile, name);
    EXPECT_EQ(to_string(c).rfind(tile + "x" + std::to_string(c.tile_k), 0), 0u) << to_string(c);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, SelectConfig, testing::Values(DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3),
                         [](const auto& info) { return std::string(name_of(info.param)); });

const LinearTiles kTilesOfOps[] = {
    linear_relu2_tiles(DType::kBFloat16, DType::kBFloat16), linear_relu2_tiles(DType::kBFloat16, DType::kFloat8E4M3),
    linear_compress_tiles(DType::kBFloat16, DType::kBFloat16, DType::kBFloat16), linear_relu2_gradient_tiles()};

TEST_P(SelectConfig, OrdersPadFewTiles) {
  const auto expect_few = [](int64_t clusters, int64_t tiles, const auto& c) {
    const int64_t padded = round_up(clusters, int64_t{c.swizzle}) * round_up(tiles, int64_t{c.swizzle});
    EXPECT_LE(double(padded), 1.05 * double(clusters * tiles) + 1) << to_string(c);
  };
  for (int64_t m : {1, 300, 1024, 1536, 8192, 8448, 65536}) {
    for (int64_t n : {16, 1664, 1856, 2560, 6656, 8192, 15680, 16384}) {
      const GemmConfig c = select(m, n, 16384);
      expect_few(ceil_div(m, c.tile_m * c.cluster_m), ceil_div(n, c.tile_n), c);
      for (const LinearTiles& tiles : kTilesOfOps) {
        const GemmConfig l = select_linear_config(GetParam(), m, n, 4096, 132, tiles);
        // Those of 128x256 are groups, which none pad (test_schedulers_emulated.cpp).
        if (l.tile != GemmTile::k128x256)
          expect_few(ceil_div(m, l.tile_m * l.cluster_m), ceil_div(n, l.tile_n * l.cluster_n), l);
      }
    }
  }
}

/// Reading that is hidden costs energy: of orders that take as long the one that reads least is 2 to 3 % faster.
TEST(SelectMmConfig, ReadsLittleWhereThatPadsNoTiles) {
  const auto chosen = [](DType dtype, int64_t m, int64_t n, int64_t k) {
    return to_string(select_mm_config(dtype, m, n, k, 132));
  };
  EXPECT_EQ(chosen(DType::kFloat8E4M3, 8192, 4096, 16384), "128x256x128 cluster 2x1 swizzle 8 along N");
  EXPECT_EQ(chosen(DType::kBFloat16, 8192, 4096, 16384), "128x256x64 cluster 2x1 swizzle 8 along N");
  EXPECT_EQ(chosen(DType::kFloat8E4M3, 16384, 2560, 18432), "128x256x128 cluster 2x1 swizzle 1 along N");
  EXPECT_EQ(chosen(DType::kFloat8E4M3, 32768, 1664, 6656), "256x192x128 cluster 2x1 swizzle 1 along N");
}

/// What was the fastest of 17 tiles and splits (docs/log). A tile costs the filling of its pipeline, so that K is
/// not cut where larger parts do as well; and all of B is read, however fast the tiles are.
TEST(SelectMmConfig, TakesWhatWasFastestForFewTokens) {
  const auto chosen = [](DType dtype, int64_t m, int64_t n, int64_t k) {
    const GemmConfig c = select_mm_config(dtype, m, n, k, 132);
    return std::to_string(c.tile_m) + "x" + std::to_string(c.tile_n) + " in " + std::to_string(c.splits);
  };
  EXPECT_EQ(chosen(DType::kBFloat16, 16, 4096, 16384), "64x64 in 1");
  EXPECT_EQ(chosen(DType::kBFloat16, 128, 4096, 16384), "64x64 in 1");
  EXPECT_EQ(chosen(DType::kBFloat16, 512, 1664, 6656), "128x128 in 2");
  EXPECT_EQ(chosen(DType::kFloat8E4M3, 128, 1664, 6656), "64x128 in 4");
  // 36.5 us, where 128x256 in 4 takes 47.4.
  EXPECT_EQ(chosen(DType::kFloat8E4M3, 256, 4096, 16384), "64x128 in 1");
}

/// Of 256x192 and 128x256 the one that was faster (docs/log).
TEST(SelectMmConfig, TakesTheLargestTileWhereItsWavesCostLess) {
  const auto tile = [](DType dtype, int64_t m, int64_t n) { return select_mm_config(dtype, m, n, 16384, 132).tile; };
  for (DType dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
    for (const auto& [m, n] : {std::pair{8192, 4096}, {16384, 4096}, {16384, 2560}, {18432, 2560}, {32768, 2048}})
      EXPECT_EQ(tile(dtype, m, n), GemmTile::k128x256) << m << " x " << n;
    // Both make waves of as much.
    for (const auto& [m, n] : {std::pair{8192, 3072}, {32768, 768}})
      EXPECT_EQ(tile(dtype, m, n), GemmTile::k128x256) << m << " x " << n;
    for (const auto& [m, n] : {std::pair{8192, 2048}, {32768, 1024}, {2048, 4096}, {32768, 1280}})
      EXPECT_EQ(tile(dtype, m, n), GemmTile::k128x256) << m << " x " << n;
    for (const auto& [m, n, k] : {std::tuple{16384, 6144, 24576}, {16384, 4096, 21504}})
      EXPECT_EQ(select_mm_config(dtype, m, n, k, 132).tile, GemmTile::k128x256) << m << " x " << n;
    // The last column of 128x256 is half empty.
    for (const auto& [m, n] : {std::pair{32768, 1664}, {6656, 1664}, {8192, 4480}})
      EXPECT_EQ(tile(dtype, m, n), GemmTile::k256x192) << m << " x " << n;
  }
}

/// With the tiles of linear_compress where all is of one type.
GemmConfig select_wide(DType dtype, int64_t m, int64_t n, int64_t k) {
  return select_linear_config(dtype, m, n, k, 132, linear_compress_tiles(dtype, dtype, dtype));
}

TEST_P(SelectConfig, TheFirstGemmSaysWhatItRuns) {
  const GemmConfig c = select_linear_config(GetParam(), 8192, 16384, 4096, 132, {GemmTile::k128x128});
  const std::string depth = GetParam() == DType::kFloat8E4M3 ? "128" : "64";
  EXPECT_EQ(to_string(c).rfind("128x128x" + depth + " cluster 1x2 swizzle ", 0), 0u) << to_string(c);
}

TEST(SelectLinearConfig, ListsWhatItChoosesFrom) {
  const std::vector<GemmConfig> configs =
      linear_configs(DType::kBFloat16, {GemmTile::k128x256, GemmTile::k128x192, GemmTile::k128x128, GemmTile::k128x64});
  ASSERT_EQ(configs.size(), 4u);
  EXPECT_EQ(to_string(configs[0]), "128x64x64 cluster 1x2 swizzle 1 along M");
  EXPECT_EQ(to_string(configs[1]), "128x128x64 cluster 1x2 swizzle 1 along M");
  EXPECT_EQ(to_string(configs[2]), "128x192x64 cluster 2x1 swizzle 1 along M");
  EXPECT_EQ(to_string(configs[3]), "128x256x64 cluster 2x1 swizzle 1 along M");
  for (const LinearTiles& tiles : kTilesOfOps) {
    ASSERT_EQ(linear_configs(DType::kBFloat16, tiles).size(), tiles.size());
    for (int64_t m : {128, 1536, 16384}) {
      const GemmTile chosen = select_linear_config(DType::kBFloat16, m, 16384, 4096, 132, tiles).tile;
      EXPECT_NE(std::find(tiles.begin(), tiles.end(), chosen), tiles.end()) << m;
    }
  }
}

TEST(SelectLinearConfig, TakesAWiderTileWhereItsWavesCostLess) {
  for (const GemmTile widest : {GemmTile::k128x192, GemmTile::k128x256}) {
    for (const auto& [m, n] : {std::pair{16384, 16384}, {32768, 6656}, {16384, 18432}, {65536, 6144}}) {
      const GemmConfig c = select_linear_config(DType::kBFloat16, m, n, 4096, 132, {GemmTile::k128x128, widest});
      EXPECT_EQ(c.tile, widest) << m << " x " << n;
    }
  }
}

/// A cluster of 128x128 tiles lies along N: 1, 2 or 3 rows of tiles leave nobody idle (docs/log).
TEST(SelectLinearConfig, FewTokensTakeSmallTilesOneRowBesideTheOther) {
  for (int64_t m : {1, 128, 384}) {
    const GemmConfig c = select_wide(DType::kBFloat16, m, 16384, 4096);
    EXPECT_EQ(c.tile, GemmTile::k128x128) << m;
    EXPECT_EQ(c.cluster_m, 1);
    EXPECT_EQ(c.cluster_n, 2);
    // The same rows of w for all tokens, one after the other: w is read once.
    EXPECT_TRUE(m <= 128 || c.raster_along_m) << to_string(c);
  }
}

/// One round of 128x256 tiles, 51 us, against two of 128x128, 56; with fewer columns its last epilogue is too long.
TEST(SelectLinearConfig, OneRoundOfTheWidestTileWhereColumnsAreMany) {
  EXPECT_EQ(select_wide(DType::kBFloat16, 256, 16384, 4096).tile, GemmTile::k128x256);
  EXPECT_EQ(select_wide(DType::kBFloat16, 512, 6656, 1664).tile, GemmTile::k128x128);
  EXPECT_EQ(select_wide(DType::kBFloat16, 768, 5120, 1280).tile, GemmTile::k128x128);
  EXPECT_EQ(select_wide(DType::kFloat8E4M3, 256, 16384, 4096).tile, GemmTile::k128x128);
}

/// linear_relu2 has tiles for sizes that fill only half of the machine, or one wave of it (docs/log).
TEST(SelectLinearConfig, TheDenseFallbackFillsTheMachine) {
  const auto tile = [](int64_t m, int64_t n, int64_t k) {
    return select_linear_config(DType::kBFloat16, m, n, k, 132, linear_relu2_tiles(DType::kBFloat16, DType::kBFloat16))
        .tile;
  };
  EXPECT_EQ(tile(128, 6656, 1664), GemmTile::k128x64);
  EXPECT_EQ(tile(128, 16384, 4096), GemmTile::k128x128);
  EXPECT_EQ(tile(1536, 1856, 2688), GemmTile::k128x192);
  EXPECT_EQ(tile(16384, 16384, 4096), GemmTile::k128x256);
}

/// 128x256 runs at least 16 K tiles, of 64 columns in 16 bits and of 128 in fp8.
TEST(SelectLinearConfig, TakesTheWidestTileForManyColumns) {
  const auto tile = [](DType dtype, int64_t k) { return select_wide(dtype, 32768, 6656, k).tile; };
  EXPECT_EQ(tile(DType::kBFloat16, 768), GemmTile::k128x192);
  EXPECT_EQ(tile(DType::kBFloat16, 1024), GemmTile::k128x256);
  EXPECT_EQ(tile(DType::kFloat8E4M3, 1664), GemmTile::k128x192);
  EXPECT_EQ(tile(DType::kFloat8E4M3, 5120), GemmTile::k128x256);
}

/// What was the fastest of nine tiles and orders, or within 1 % of it, in fp8, on a cool card or on a hot one
/// (docs/log).
TEST(SelectLinearConfig, TakesWhatWasFastestInFp8) {
  const auto chosen = [](int64_t m, int64_t n, int64_t k) {
    return to_string(select_wide(DType::kFloat8E4M3, m, n, k));
  };
  EXPECT_EQ(chosen(8192, 16384, 4096), "128x256x128 cluster 2x1 swizzle 11 along N, the last tiles in quarters");
  EXPECT_EQ(chosen(16384, 18432, 2560), "128x256x128 cluster 2x1 swizzle 24 along M");
  EXPECT_EQ(chosen(16384, 21504, 4096), "128x256x128 cluster 2x1 swizzle 14 along M, the last tiles in quarters");
  EXPECT_EQ(chosen(32768, 6656, 1664), "128x192x128 cluster 2x1 swizzle 1 along N");
}

/// 4,096 tiles are 31 waves of 132 and four tiles, which would cost a 32nd; 10,752 leave 60 over, 9,216 leave 108.
TEST(SelectLinearConfig, DividesTheTilesOfARaggedRound) {
  const auto splits_last_wave = [](GemmTile tile, int64_t m, int64_t n) {
    return select_linear_config(DType::kBFloat16, m, n, 4096, 132, {tile}).splits_last_wave;
  };
  EXPECT_TRUE(splits_last_wave(GemmTile::k128x256, 8192, 16384));
  EXPECT_TRUE(splits_last_wave(GemmTile::k128x256, 16384, 21504));
  EXPECT_FALSE(splits_last_wave(GemmTile::k128x256, 16384, 18432));
  EXPECT_FALSE(splits_last_wave(GemmTile::k128x256, 128 * 132, 256 * 16));  // whole waves
  EXPECT_FALSE(splits_last_wave(GemmTile::k128x256, 512, 1024));            // less than one
  EXPECT_FALSE(splits_last_wave(GemmTile::k128x192, 8192, 16384));
  EXPECT_EQ(to_string(select_linear_config(DType::kBFloat16, 8192, 16384, 4096, 132, {GemmTile::k128x256})),
            "128x256x64 cluster 2x1 swizzle 8 along M, the last tiles in quarters");
}

/// The configuration for x of `dtype`, y as the kernel stores it, and the output, whose metadata it stores.
std::string packed_config(DType dtype, DType y, int64_t out, DType output) {
  LinearCompressArgs args{};
  args.linear.tokens = 8192;
  args.linear.in = 4096;
  args.linear.out = out;
  args.linear.dtype = dtype;
  args.linear.y_dtype = y;
  args.meta_dtype = output;
  return to_string(linear_packed_config(args));
}

/// Overlapped tiles are for what those of one warpgroup are not compiled for: features in halves of 32, another dtype
/// of y than that of x.
TEST(LinearPackedConfig, HasTilesOfOneWarpgroup) {
  const DType bf16 = DType::kBFloat16, fp8 = DType::kFloat8E4M3;
  EXPECT_EQ(packed_config(bf16, bf16, 16384, bf16), "128x192x64 cluster 2x1 swizzle 8 along M");
  EXPECT_EQ(packed_config(bf16, bf16, 16400, bf16), "128x256x64 cluster 2x1 swizzle 8 along M");
  EXPECT_EQ(packed_config(fp8, fp8, 16384, fp8), "128x192x128 cluster 2x1 swizzle 8 along M");
  EXPECT_EQ(packed_config(fp8, bf16, 16384, fp8), "128x256x128 cluster 2x1 swizzle 8 along M");
}

/// Whether scales are given or follow from 16-bit y, the output has the dtype of x.
TEST(LinearPackedConfig, RefusesWhatIsNotCompiled) {
  const DType bf16 = DType::kBFloat16, fp8 = DType::kFloat8E4M3;
  const auto refused = [](DType dtype, DType y, int64_t out, DType output) -> std::string {
    try {
      return packed_config(dtype, y, out, output);
    } catch (const Error& e) {
      return e.what();
    }
  };
  const std::string op = "sparse24.linear_compress_packed: expected ";
  const std::string of_16_bits = op + "out_dtype to be bfloat16 (the dtype of x, on CUDA), got float8_e4m3fn";
  EXPECT_EQ(refused(bf16, fp8, 16384, fp8), of_16_bits);
  EXPECT_EQ(refused(bf16, bf16, 16384, fp8), of_16_bits);
  EXPECT_EQ(refused(fp8, bf16, 16384, bf16),
            op + "out_dtype to be float8_e4m3fn (the dtype of x, on CUDA), got bfloat16");
  EXPECT_EQ(refused(fp8, fp8, 16400, fp8), op + "w to have a multiple of 32 rows (float8_e4m3fn output), got 16400");
}

TEST(SelectConfigFloat32, IsRefused) {
  EXPECT_THROW(select_mm_config(DType::kFloat32, 64, 64, 64, 132), Error);
  EXPECT_THROW(select_linear_config(DType::kFloat32, 64, 64, 64, 132, {GemmTile::k128x256}), Error);
}

/// One tile, whatever the sizes, and the order that the first GEMM would take with it.
TEST(SelectLinearGradientConfig, IsTheOneTileInTheOrderThatReadsLeast) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    for (int64_t tokens : {1, 300, 8192, 65536}) {
      for (int64_t features : {16, 6656, 28672}) {
        const GemmConfig c = select_linear_gradient_config(dtype, tokens, features, 132);
        EXPECT_EQ(c.tile, kLinearGradientTile);
        EXPECT_EQ(c.tile_m, 128);
        EXPECT_EQ(c.tile_n, 192);
        EXPECT_EQ(to_string(c), to_string(select_linear_config(dtype, tokens, features, 4096, 132, {c.tile})));
      }
    }
  }
}

}  // namespace
}  // namespace sparse24
