/// @file
/// The epilogue of experts_linear_gradient on the host, over the places that the scheduler gives, against the CPU
/// reference.
#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <vector>

#include "emulator/epilogue.h"
// After it.
#include "gemm/sm90/epilogues/experts_gradient.cuh"
#include "gemm/sm90/schedulers/expert_scheduler.cuh"
#include "support/compressed.h"

namespace sparse24::emulate {
namespace {

using cuda::ExpertPlace;
using cuda::ExpertScheduler;
using test::Array;

constexpr DType kBf16 = DType::kBFloat16, kFp8 = DType::kFloat8E4M3;
constexpr int kIn = 16;

/// Experts of so many rows each, and rows of none. Products are of small integers: exact in any order.
struct Mixture {
  std::vector<int> counts;
  int beyond, features;
  bool scaled = true;
  bool dense = true;
  DType dtype = kBf16;
  bool per_row = true;  // scales of grad and of w

  int experts() const { return int(counts.size()); }
  int used() const { return std::accumulate(counts.begin(), counts.end(), 0); }
  int rows() const { return used() + beyond; }
  std::vector<int32_t> offsets() const {
    std::vector<int32_t> out(counts.size());
    std::partial_sum(counts.begin(), counts.end(), out.begin());
    return out;
  }
};

/// A case, and what one run makes of it.
struct Run {
  explicit Run(const Mixture& m)
      : of(m),
        offsets(m.offsets()),
        experts{m.experts(), m.rows(), offsets.data()},
        padded(experts.padded_rows()),
        grad(test::random_integers(m.dtype, int64_t{m.rows()} * kIn, 5, 1)),
        w(test::random_integers(m.dtype, int64_t{m.experts()} * kIn * m.features, 5, 2)),
        y(test::cpu_compress(test::random_activations(kBf16, padded * m.features, 3, /*specials=*/false), padded,
                             m.features, m.dtype, {Dim::kFeatures, Activation::kRelu2})),
        factors(size_t(m.rows())),
        of_grad(powers(m.rows(), 3)),
        of_w(powers(int64_t{m.experts()} * m.features, 5)),
        dh(padded * m.features),
        dh_dense(int64_t{2} * m.rows() * m.features),
        y_dense(int64_t{2} * m.rows() * m.features),
        products(int64_t{4} * m.rows() * ExpertsLinearGradientArgs::product_parts(m.features)) {
    for (size_t i = 0; i < factors.size(); ++i) factors[i] = 0.25f * float(1 + i % 7);
  }
  /// Scales of which products are exact.
  static std::vector<float> powers(int64_t count, int period) {
    std::vector<float> out(static_cast<size_t>(count));
    for (size_t i = 0; i < out.size(); ++i) out[i] = std::ldexp(1.f, int(i) % period - period / 2);
    return out;
  }

  Mixture of;
  std::vector<int32_t> offsets;
  Experts experts;
  int64_t padded;
  Array grad, w;
  test::Compressed y;
  std::vector<float> factors, of_grad, of_w;
  Guarded dh, dh_dense, y_dense, products;

  ExpertsLinearGradientArgs args() {
    ExpertsLinearGradientArgs a{};
    a.experts = experts;
    a.in = kIn;
    a.features = of.features;
    a.dtype = of.dtype;
    a.grad = grad.data();
    a.w = w.data();
    a.values = y.values.data();
    a.meta = y.meta.data();
    a.row_scale = of.scaled ? factors.data() : nullptr;
    a.dh = dh.data();
    a.dh_dense = of.dense ? dh_dense.data() : nullptr;
    a.y_dense = of.dense ? y_dense.data() : nullptr;
    a.products = products.data<float>();
    if (of.dtype == kFp8) {
      a.scale_grad = of_grad.data();
      a.scale_w = of_w.data();
      a.scale_grad_per_row = a.scale_w_per_row = of.per_row;
      a.scale_y = y.scale.data();
    }
    return a;
  }
  float product(int row, int expert, int column) const {
    float sum = 0;
    for (int k = 0; k < kIn; ++k) {
      const int64_t of_w = of.dtype == kFp8 ? (int64_t{expert} * of.features + column) * kIn + k
                                            : (int64_t{expert} * kIn + k) * of.features + column;
      sum += float(grad[int64_t{row} * kIn + k] * w[of_w]);
    }
    return sum;
  }
};

template <bool kIsFp8>
void run_kernel(Run& run, Order order) {
  using namespace cute;
  using Tile = emulate::Tile<128, 192, Schedule::kOverlapped>;
  using Epilogue = cuda::ExpertsGradientEpilogue<__nv_bfloat16, kIsFp8, Tile::kM, Tile::kN>;
  using Operands = typename Epilogue::Operands;
  const auto a = run.args();
  const auto params = ExpertScheduler::params(
      {run.of.rows(), run.of.features, run.of.experts(), Tile::kM, Tile::kN, a.experts.offsets}, GemmConfig{}, 2);
  auto table = std::make_unique<ExpertScheduler::Shared>();
  blockDim.x = 64;
  Block(0, 64, Order::kInTurn).run([&] { ExpertScheduler::fill(params, *table); });

  const cuda::ExpertsGradientParams p{
      run.of.rows(), run.of.features,      int(run.padded),  a.values,   a.meta,       a.row_scale,
      a.dh,          a.dh_dense,           a.y_dense,        a.products, a.scale_grad, a.scale_w,
      a.scale_y,     a.scale_grad_per_row, a.scale_w_per_row};
  for (uint32_t cta = 0; cta < 2; ++cta) {
    const ExpertScheduler scheduler(params, *table, cta);
    std::vector<ExpertPlace> places;
    for (uint32_t i = scheduler.first(); scheduler.has_tile(i); i += scheduler.stride())
      places.push_back(scheduler.tile(i));
    std::vector<Guarded> operands(places.size(), Guarded(sizeof(Operands)));
    for (size_t i = 0; i < places.size(); ++i) {
      for (int lane = 0; lane < 32; ++lane) Epilogue::fetch(p, lane, places[i], *operands[i].data<Operands>());
    }
    for (int lane = 0; lane < 32; ++lane) Epilogue::clear(p, lane, scheduler.end() + int(cta), 2);
    Block(128, 256, order).run([&] {
      typename Tile::Mma mma;
      Epilogue epilogue(p);
      const int thread = int(threadIdx.x) - 128, first = thread / 128 * 64;
      const auto coords = mma.get_slice(thread).partition_C(make_identity_tensor(take<0, 2>(typename Tile::Shape{})));
      auto acc = partition_fragment_C(mma, take<0, 2>(typename Tile::Shape{}));
      for (size_t i = 0; i < places.size(); ++i) {
        const ExpertPlace& at = places[i];
        cuda::visit_all(epilogue);  // the tile before
        if (at.rows() <= first) {
          epilogue.forget();
          continue;
        }
        for (int j = 0; j < size(acc); ++j) {
          const int row = int(get<0>(coords(j))), in_tile = int(get<1>(coords(j)));
          const int column = at.n * Tile::kN + (kIsFp8 ? Epilogue::Permutation::feature(in_tile) : in_tile);
          const bool inside = row < at.rows() && column < run.of.features;
          acc(j) = inside ? run.product(at.row + row, at.expert, column) : NAN;
        }
        cuda::AccumulatorScales scales(*operands[i].data<const Operands>(), int(get<0>(coords(0))));
        epilogue.begin(at, acc(_, _0{}, _0{}), scales);
      }
      cuda::visit_all(epilogue);
    });
  }
}

/// The elements of `size` bytes that were written are the reference's.
void expect_same(Guarded& got, Guarded& expected, int64_t begin, int64_t end, const char* what) {
  EXPECT_TRUE(got.intact()) << what;
  EXPECT_EQ(std::memcmp(got.data<const char>() + begin, expected.data<const char>() + begin, size_t(end - begin)), 0)
      << what << " " << begin;
}

void compare(const Mixture& m, Order order = Order::kForward) {
  Run got(m), expected(m);
  cpu::experts_linear_gradient(expected.args());
  m.dtype == kFp8 ? run_kernel<true>(got, order) : run_kernel<false>(got, order);
  const int64_t row_bytes = int64_t{2} * m.features;
  int64_t row = 0, padded_row = 0;
  for (int count : m.counts) {
    const int64_t kept = padded_row * row_bytes / 2;
    expect_same(got.dh, expected.dh, kept, kept + count * row_bytes / 2, "kept values of dh");
    if (m.dense) {
      expect_same(got.dh_dense, expected.dh_dense, row * row_bytes, (row + count) * row_bytes, "dh");
      expect_same(got.y_dense, expected.y_dense, row * row_bytes, (row + count) * row_bytes, "y");
    }
    row += count;
    padded_row += round_up(count, kExpertRows);
  }
  EXPECT_TRUE(got.products.intact());
  const int64_t parts = ExpertsLinearGradientArgs::product_parts(m.features);
  for (int r = 0; r < m.rows(); ++r) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += got.products.data<float>()[part * m.rows() + r];
    const float of_reference = expected.products.data<float>()[r];
    ASSERT_NEAR(sum, of_reference, 1e-4f * (1 + std::abs(of_reference))) << r;
  }
}

TEST(ExpertsGradientEmulated, EqualsTheReference) {
  compare({{130, 0, 1, 65}, 9, 208});
  compare({{0, 300}, 0, 384});
  compare({{3}, 0, 16});
  compare({{0, 0}, 5, 64});
}

TEST(ExpertsGradientEmulated, TakesFactorsAndDenseMatricesOrNone) {
  compare({{70, 2}, 1, 208, false, true});
  compare({{70, 2}, 1, 208, true, false});
}

TEST(ExpertsGradientEmulated, TakesFloat8WithScales) {
  for (bool per_row : {true, false}) {
    compare({{130, 0, 1, 65}, 9, 224, true, true, kFp8, per_row});
    compare({{0, 300}, 0, 416, false, true, kFp8, per_row});
  }
  compare({{3}, 0, 32, true, false, kFp8});
  compare({{0, 0}, 5, 64, true, true, kFp8});
  for (Order order : kOrders) compare({{129, 64}, 3, 416, true, true, kFp8}, order);
}

TEST(ExpertsGradientEmulated, DoesNotDependOnTheOrderOfThreads) {
  for (Order order : kOrders) compare({{129, 64}, 3, 400}, order);
}

}  // namespace
}  // namespace sparse24::emulate
