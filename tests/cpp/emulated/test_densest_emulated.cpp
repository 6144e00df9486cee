/// @file
/// The block of densest_features on the host, in every order of its threads, against the CPU reference.
#include <gtest/gtest.h>

#include <cstring>

#include "emulator/guarded.h"
#include "emulator/intrinsics.h"
#include "sparse24/densest_features.h"
#include "support/densest_cases.h"
// After them.
#include "elementwise/densest_features.cuh"

namespace sparse24::emulate {
namespace {

using test::Counts;

void compare(const std::vector<int32_t>& counts, int64_t k, Order order) {
  std::vector<int64_t> expected(static_cast<size_t>(k));
  cpu::densest_features({counts.data(), static_cast<int64_t>(counts.size()), k, expected.data()});
  Guarded in(static_cast<int64_t>(4 * counts.size())), out(8 * k), memory(sizeof(cuda::DensestShared));
  std::memcpy(in.data(), counts.data(), in.bytes());
  auto& shared = *memory.data<cuda::DensestShared>();
  const auto features = static_cast<unsigned>(counts.size());
  Block(0, cuda::kDensestThreads, order).run([&] {
    const auto threshold = cuda::find_threshold(in.data<int32_t>(), features, static_cast<int>(k), shared);
    cuda::write_features(in.data<int32_t>(), features, threshold, out.data<int64_t>(), shared);
  });
  const auto* got = out.data<int64_t>();
  ASSERT_EQ(std::vector<int64_t>(got, got + k), expected);
  ASSERT_TRUE(in.intact() && out.intact() && memory.intact());
}

class DensestEmulated : public testing::TestWithParam<Counts> {
 protected:
  void compare_all(int64_t features, Order order) {
    const auto counts = test::make_counts(GetParam(), features);
    for (int64_t k : test::some_k(features)) {
      SCOPED_TRACE(std::to_string(k) + " of " + std::to_string(features));
      if (k > 0) compare(counts, k, order);
    }
  }
};

/// Parts of a word, of a warp's words and of the block's; one more than a tile, and several tiles.
TEST_P(DensestEmulated, EqualsTheReference) {
  for (int64_t features : {1, 33, 1024, 5000, 32769, 70000}) compare_all(features, Order::kForward);
}

TEST_P(DensestEmulated, InAnyOrderOfItsThreads) {
  const auto counts = test::make_counts(GetParam(), 66000);
  for (Order order : kOrders) {
    compare_all(2500, order);
    compare(counts, 3300, order);
  }
}

INSTANTIATE_TEST_SUITE_P(All, DensestEmulated, testing::ValuesIn(test::kAllCounts),
                         [](const auto& info) { return testing::PrintToString(info.param); });

}  // namespace
}  // namespace sparse24::emulate
