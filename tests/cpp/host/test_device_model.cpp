/// @file
/// Devices, and how choices depend on them.
#include <gtest/gtest.h>

#include "heuristics/cost_model.h"
#include "sparse24/device_model.h"
#include "sparse24/error.h"
#include "sparse24/linear.h"
#include "sparse24/mm.h"

namespace sparse24 {
namespace {

DeviceModel find(const char* name, int sm_count) { return find_device({name, sm_count}); }

TEST(DeviceModel, IsFoundByTheBeginningOfItsName) {
  EXPECT_STREQ(find("NVIDIA H200", 132).name, "NVIDIA H200");
  EXPECT_STREQ(find("NVIDIA H100 80GB HBM3", 132).name, "NVIDIA H100 80GB HBM3");
  EXPECT_STREQ(find("NVIDIA H100 PCIe", 114).name, "NVIDIA H100 PCIe");
  EXPECT_STREQ(find("NVIDIA H20-3e", 78).name, "NVIDIA H20");
  EXPECT_STREQ(find("NVIDIA GH200 480GB", 132).name, "NVIDIA GH200");
  EXPECT_STREQ(find("NVIDIA H2000", 132).name, "unknown");
}

TEST(DeviceModel, HasTheMultiprocessorsThatThereAre) {
  EXPECT_EQ(find("NVIDIA H200", 66).sm_count, 66);
  EXPECT_EQ(find("NVIDIA H200", 66).sm_tflops, reference_device().sm_tflops);
  EXPECT_NEAR(reference_device().sm_tflops * reference_device().sm_count, 989.4, 1e-9);
}

TEST(DeviceModel, OfAnUnknownDeviceIsWhatItsFactsSay) {
  const DeviceModel silent = find("X", 100);
  EXPECT_EQ(silent.sm_tflops, reference_device().sm_tflops);
  EXPECT_EQ(silent.memory_tb_s, reference_device().memory_tb_s);
  EXPECT_EQ(silent.l2_bytes, reference_device().l2_bytes);
  DeviceFacts facts{"X", 100};
  facts.clock_mhz = 1830;
  facts.memory_tb_s = 1.5;
  facts.l2_bytes = 4e7;
  const DeviceModel model = find_device(facts);
  EXPECT_NEAR(model.sm_tflops, reference_device().sm_tflops, 0.01);  // the clock of the data sheet's rate
  EXPECT_EQ(model.memory_tb_s, 1.5);
  EXPECT_EQ(model.l2_bytes, 4e7);
}

TEST(DeviceModel, ReadsNoFasterThanWasMeasured) {
  EXPECT_EQ(find("NVIDIA H200", 132).memory_tb_s, find("NVIDIA H100 80GB HBM3", 132).memory_tb_s);
  EXPECT_LT(find("NVIDIA H100 PCIe", 114).memory_tb_s, find("NVIDIA H200", 132).memory_tb_s);
}

/// The same chip with the same rates: one set of choices.
TEST(SelectOfDevices, AnH100ChoosesAsAnH200) {
  const DeviceModel h100 = find("NVIDIA H100 80GB HBM3", 132), h200 = find("NVIDIA H200", 132);
  for (DType dtype : {DType::kBFloat16, DType::kFloat8E4M3}) {
    const LinearTiles tiles = linear_compress_tiles(dtype, dtype, dtype);
    for (int64_t m : {1, 300, 2048, 16384}) {
      for (int64_t n : {1664, 4096, 18432}) {
        EXPECT_EQ(to_string(select_mm_config(dtype, m, n, 6656, h100)),
                  to_string(select_mm_config(dtype, m, n, 6656, h200)));
        EXPECT_EQ(to_string(select_mm_config(dtype, m, n, 6656, h200)),
                  to_string(select_mm_config(dtype, m, n, 6656, 132)));
        EXPECT_EQ(to_string(select_linear_config(dtype, m, n, 4096, h100, tiles)),
                  to_string(select_linear_config(dtype, m, n, 4096, 132, tiles)));
      }
    }
  }
}

/// A multiprocessor of an H20 computes at a quarter of the rate, and its memory is as fast: few tokens, which all
/// others read B for, compute there.
TEST(SelectOfDevices, SlowTensorCoresHideReading) {
  const DeviceModel slow = find("NVIDIA H20", 78), fast = reference_device(78);
  EXPECT_NEAR(fast.sm_tflops / slow.sm_tflops, 3.95, 0.01);
  EXPECT_EQ(fast.memory_tb_s, slow.memory_tb_s);
  const GemmProblem problem{Product::kSparse, DType::kBFloat16, 64, 4096, 16384};
  const GemmConfig config = select_mm_config(DType::kBFloat16, 64, 4096, 16384, slow);
  const double slow_us = CostModel{slow, measured_costs()}.predicted_us(problem, config);
  const double fast_us = CostModel{fast, measured_costs()}.predicted_us(problem, config);
  EXPECT_GT(slow_us, 1.2 * fast_us);
  EXPECT_LT(slow_us, 3.95 * fast_us);
}

TEST(Costs, PredictMicroseconds) {
  const DeviceModel device = reference_device();
  const CostModel model{device, measured_costs()};
  // bench/results/h200/mm.json and ffn_forward.json.
  const auto mm_us = [&](DType dtype, int64_t m, int64_t n, int64_t k) {
    return model.predicted_us({Product::kSparse, dtype, m, n, k}, select_mm_config(dtype, m, n, k, device));
  };
  const auto linear_us = [&](DType dtype, int64_t m, int64_t n, int64_t k) {
    return model.predicted_us({Product::kDense, dtype, m, n, k},
                              select_linear_config(dtype, m, n, k, device, linear_compress_tiles(dtype, dtype, dtype)));
  };
  EXPECT_NEAR(mm_us(DType::kBFloat16, 8192, 4096, 16384) / 870, 1, 0.12);
  EXPECT_NEAR(mm_us(DType::kFloat8E4M3, 8192, 4096, 16384) / 471, 1, 0.12);
  EXPECT_NEAR(linear_us(DType::kBFloat16, 8192, 16384, 4096) / 1395, 1, 0.12);
  EXPECT_NEAR(linear_us(DType::kFloat8E4M3, 8192, 16384, 4096) / 712, 1, 0.12);
}

TEST(Costs, ATileThatWasNotMeasuredIsNotChosen) {
  Costs costs = measured_costs();
  for (auto& tiles : costs.tiles[int(Product::kDense)]) tiles[int(GemmTile::k128x256)].throughput = 0;
  const DeviceModel device = reference_device();
  const GemmProblem problem{Product::kDense, DType::kBFloat16, 16384, 16384, 4096};
  const std::vector<GemmConfig> configs =
      linear_configs(DType::kBFloat16, linear_compress_tiles(DType::kBFloat16, DType::kBFloat16, DType::kBFloat16));
  EXPECT_EQ(fastest({device, measured_costs()}, problem, configs).tile, GemmTile::k128x256);
  EXPECT_NE(fastest({device, costs}, problem, configs).tile, GemmTile::k128x256);
}

TEST(Costs, EveryCompiledTileHasBeenMeasured) {
  for (DType dtype : {DType::kBFloat16, DType::kFloat16, DType::kFloat8E4M3}) {
    for (const GemmConfig& c : mm_configs(dtype))
      EXPECT_GT(measured_costs().tile(Product::kSparse, dtype, c.tile).throughput, 0) << to_string(c);
    for (const GemmConfig& c : linear_configs(dtype, linear_relu2_tiles(dtype, dtype)))
      EXPECT_GT(measured_costs().tile(Product::kDense, dtype, c.tile).throughput, 0) << to_string(c);
  }
}

TEST(Costs, ARowOfNothingIsRefused) {
  for (const CostRow& row : {CostRow{"", 0, "", "throughput", 1, ""}, CostRow{"sparse", 0, "", "unshared", 1, ""},
                             CostRow{"spare", 0, "", "start", 1, ""}, CostRow{"dense", 32, "", "start", 1, ""},
                             CostRow{"dense", 0, "1x1", "start", 1, ""}, CostRow{"dense", 0, "64x64", "mac_us", 1, ""}})
    EXPECT_THROW(costs_of({row}), Error) << row.field;
}

}  // namespace
}  // namespace sparse24
