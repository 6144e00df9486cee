/// @file
/// The emulation itself: what its instructions do, and that what is wrong on the device is wrong, or an error, in it.
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "emulator/guarded.h"
#include "emulator/ptx.h"

namespace sparse24::emulate {
namespace {

/// The message of what `thread` throws when the given number of threads, 128 on, run it; "" if nothing.
std::string error_of(int threads, const std::function<void()>& thread, Order order = Order::kForward) {
  try {
    Block(128, threads, order).run(thread);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

TEST(Block, ExchangesValuesWithinEachWarp) {
  for (Order order : kOrders) {
    std::vector<int> got(384), sums(384);
    EXPECT_EQ(error_of(
                  256,
                  [&] {
                    const int x = int(threadIdx.x);
                    got[x] = __shfl_xor_sync(0xffffffffu, x, 1) + 1000 * __shfl_xor_sync(0xffffffffu, x, 2);
                    sums[x] = __reduce_add_sync(0xffffffffu, x);
                  },
                  order),
              "");
    for (int x = 128; x < 384; ++x) {
      EXPECT_EQ(got[x], (x ^ 1) + 1000 * (x ^ 2));
      EXPECT_EQ(sums[x], 32 * (x / 32 * 32) + 31 * 16);
    }
  }
}

TEST(Block, VotesScansAndCombines) {
  EXPECT_EQ(error_of(64,
                     [] {
                       const unsigned x = threadIdx.x, lane = x % 32;
                       EXPECT_EQ(__ballot_sync(0xffffffffu, lane % 3 == 0), 0x49249249u);
                       EXPECT_EQ(__shfl_up_sync(0xffffffffu, x, 4), lane < 4 ? x : x - 4);
                       EXPECT_EQ(__reduce_or_sync(0xffffffffu, 1u << lane / 4), 0xffu);
                       EXPECT_EQ(__reduce_add_sync(0xffffffffu, 0x80000001u), 32u);
                     }),
            "");
}

TEST(Block, WaitsForAllAtABarrier) {
  for (Order order : kOrders) {
    int before = 0, between = 0;
    EXPECT_EQ(error_of(
                  96,
                  [&] {
                    ++before;
                    __syncthreads();
                    EXPECT_EQ(before, 96);
                    ++between;
                    __syncthreads();
                    EXPECT_EQ(between, 96);
                  },
                  order),
              "");
  }
}

TEST(Block, FailsWhereAThreadMissesABarrier) {
  const auto error = error_of(64, [] {
    if (threadIdx.x != 160) __syncthreads();
  });
  EXPECT_NE(error.find("128 at bar.sync 0"), std::string::npos) << error;
  EXPECT_EQ(error.find("160 at"), std::string::npos) << error;
}

TEST(Block, TransposesMatricesOf16Bits) {
  EXPECT_EQ(error_of(32,
                     [] {
                       // Element (row, column) is 8 row + column.
                       const uint32_t lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
                       const uint32_t got = cuda::transpose_8x8((8 * row + column) | (8 * row + column + 1) << 16);
                       EXPECT_EQ(got, (8 * column + row) | (8 * (column + 1) + row) << 16);
                     }),
            "");
}

TEST(Block, FailsWhereLanesAreMissing) {
  const auto error = error_of(32, [] {
    if (threadIdx.x != 131) __shfl_xor_sync(0xffffffffu, 0, 1);
  });
  EXPECT_NE(error.find("never come: 128 at shfl.xor 1, 129"), std::string::npos) << error;
}

TEST(Block, FailsWhereLanesComeToDifferentInstructions) {
  const auto error = error_of(32, [] {
    if (threadIdx.x % 2) {
      __shfl_xor_sync(0xffffffffu, 0, 1);
    } else {
      __reduce_add_sync(0xffffffffu, 0);
    }
  });
  EXPECT_EQ(error, "thread 129 is at shfl.xor 1, others at redux.add 0");
  EXPECT_NE(error_of(32, [] { __shfl_xor_sync(0xffffffffu, 0, threadIdx.x % 2 ? 1 : 2); }), "");
}

TEST(Block, FailsWhereMasksAreNotWhole) {
  EXPECT_EQ(error_of(32, [] { __shfl_xor_sync(0xffffu, 0, 1); }), "expected an instruction of all 32 lanes");
}

TEST(Guarded, NoticesWritesOnBothSides) {
  for (int at : {-4096, -1, 5, 4100}) {
    Guarded bytes(5);
    std::fill_n(bytes.data<char>(), 5, '\0');
    EXPECT_TRUE(bytes.intact());
    bytes.data<char>()[at] = 0;
    EXPECT_FALSE(bytes.intact()) << at;
  }
}

}  // namespace
}  // namespace sparse24::emulate
