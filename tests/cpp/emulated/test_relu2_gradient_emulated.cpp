/// @file
/// The epilogue of linear_relu2_gradient on the host, for both types and two widths of the tile, against the CPU
/// reference.
#include <gtest/gtest.h>

#include "emulator/epilogue.h"
// After it.
#include "emulator/sums.h"
#include "gemm/sm90/epilogues/relu2_gradient.cuh"
#include "support/relu2_gradient_case.h"

namespace sparse24::emulate {
namespace {

using test::Array;
using test::Relu2GradientCase;

/// dy [tokens, features] is given; grad and w the epilogue never sees.
struct DyCase {
  int tokens, features;
  DType dtype;
  bool specials = false;  ///< NaN and infinities, in dy and in y
  bool roots = false;     ///< the epilogue is given those of y, relu(h)

  Sums dy() const { return {tokens, features, specials}; }
  Array y() const {
    const Array h = test::random_activations(dtype, int64_t{tokens} * features, 5, specials);
    return roots ? test::relu(h) : test::squared_relu(h);
  }
};
void PrintTo(const DyCase& c, std::ostream* out) {
  *out << name_of(c.dtype) << " " << c.tokens << " x " << c.features << (c.specials ? ", specials" : "")
       << (c.roots ? ", roots" : "");
}

/// Token by token: grad = 1 and w = its dy, so that they reach dh unchanged, NaN included.
Array reference(const DyCase& c, const Array& y) {
  Array all(c.dtype, y.size());
  for (int t = 0; t < c.tokens; ++t) {
    Array grad(DType::kFloat32, std::vector<double>{1}), w(DType::kFloat32, c.features), own(c.dtype, c.features);
    std::memcpy(w.data(), c.dy().row(t).data(), w.bytes());
    std::memcpy(own.data(), static_cast<const char*>(y.data()) + t * own.bytes(), own.bytes());
    const Array dh =
        test::cpu_linear_relu2_gradient({1, 1, c.features, std::move(grad), std::move(w), std::move(own), c.roots});
    std::memcpy(static_cast<char*>(all.data()) + t * dh.bytes(), dh.data(), dh.bytes());
  }
  return all;
}

template <DType kDType_, class T_, int kN>
struct Kernel {
  using T = T_;
  using Tile = emulate::Tile<128, kN, Schedule::kPingpong>;
  static constexpr DType kDType = kDType_;
};

template <class Kernel>
class Relu2GradientEmulated : public testing::Test {
 protected:
  using Tile = typename Kernel::Tile;
  static constexpr DType kDType = Kernel::kDType;

  /// dh is the reference's; nothing else is written, and nothing beside y is read.
  void compare(const DyCase& c, Order order = Order::kForward) {
    SCOPED_TRACE(testing::PrintToString(c));
    const Array y = c.y(), expected = reference(c, y);
    Guarded own_y(y.bytes()), dh(expected.bytes());
    std::memcpy(own_y.data(), y.data(), y.bytes());
    using T = typename Kernel::T;
    const cuda::Relu2GradientParams<T> params{cuda::StoredDerivative<T>(c.roots), c.tokens, c.features, own_y.data(),
                                              dh.data()};
    using Epilogue = cuda::Relu2GradientEpilogue<T, Tile::kM, Tile::kN>;
    run_epilogue<Epilogue, Tile>(params, c.tokens, c.features, c.dy(), order);
    Array got(c.dtype, expected.size());
    std::memcpy(got.data(), dh.data(), got.bytes());
    const int64_t at = got.first_difference(expected);
    ASSERT_EQ(at, -1) << "dh[" << at / c.features << ", " << at % c.features << "]";
    ASSERT_TRUE(dh.intact() && own_y.intact());
    ASSERT_EQ(std::memcmp(own_y.data(), y.data(), y.bytes()), 0) << "y is written";
  }
};

using Kernels = testing::Types<Kernel<DType::kBFloat16, __nv_bfloat16, 128>, Kernel<DType::kFloat16, __half, 128>,
                               Kernel<DType::kBFloat16, __nv_bfloat16, 192>, Kernel<DType::kFloat16, __half, 192>>;
struct KernelName {
  template <class Kernel>
  static std::string GetName(int) {
    return std::to_string(Kernel::Tile::kM) + "x" + std::to_string(Kernel::Tile::kN) + "_" + name_of(Kernel::kDType);
  }
};
TYPED_TEST_SUITE(Relu2GradientEmulated, Kernels, KernelName);

/// One token; tails of a warp's rows, of a quad's columns and of tiles, in tokens and in features; whole tiles.
constexpr int kSizes[][2] = {{1, 8},    {2, 24},  {7, 40},    {8, 64},    {9, 128},   {15, 136}, {17, 192},
                             {63, 200}, {65, 48}, {127, 384}, {129, 288}, {256, 512}, {261, 264}};

TYPED_TEST(Relu2GradientEmulated, EqualsTheReference) {
  for (const auto& [tokens, features] : kSizes) this->compare({tokens, features, this->kDType});
}

TYPED_TEST(Relu2GradientEmulated, EqualsTheReferenceOnNanAndInfinities) {
  for (const auto& [tokens, features] : kSizes) this->compare({tokens, features, this->kDType, /*specials=*/true});
}

TYPED_TEST(Relu2GradientEmulated, RootsEqualTheReference) {
  if constexpr (!cuda::kHasRoots<typename TypeParam::T>) GTEST_SKIP() << "this kernel takes squares alone";
  for (bool specials : {false, true}) this->compare({129, 288, this->kDType, specials, /*roots=*/true});
}

TYPED_TEST(Relu2GradientEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) this->compare({301, 488, this->kDType, /*specials=*/true}, order);
}

}  // namespace
}  // namespace sparse24::emulate
