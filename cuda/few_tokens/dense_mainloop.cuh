// The mainloop of a dense product of few tokens: of up to 64 the weight is the operand of 64 rows of wgmma, and tokens
// are its columns; of more, which are two such operands, the other way around.
//
// One thread copies chunks of the weight and of x to a ring in shared memory by the TMA; each warpgroup multiplies 64
// rows. What is read of a ring beyond the rows of a tile is multiplied too, and not used.
#pragma once

#ifndef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // products of any multiple of 16 columns
#endif
#include <cutlass/arch/barrier.h>

#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/numeric/integral_constant.hpp>
#include <utility>

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/dense_few.h"

namespace sparse24::cuda {

// What is in shared memory in front of a ring.
template <int kTokens, int kRows, int kMaxStages>
struct DenseShared {
  alignas(8) uint64_t full[kMaxStages], empty[kMaxStages];
  float of_tokens[2][kTokens], of_rows[2][kRows];
};

// The product of 64 rows of one operand with kColumns of the other.
template <class Element, int kColumns>
using DenseProduct = decltype(cute::SM90::GMMA::ss_op_selector<
                              Element, Element, float,
                              cute::Shape<cute::_64, cute::Int<kColumns>, cute::Int<32 / int(sizeof(Element))>>>());

// A product of up to 64 tokens, so many columns.
template <class Element_, int kTokens_>
struct DenseTile {
  using Element = Element_;
  static constexpr int kTokens = kTokens_, kBoxBytes = 128;  // a chunk of K
  static constexpr int kMaxWarpgroups = 3, kMaxStages = 16;
  static constexpr int kMaxThreads = 128 * kMaxWarpgroups + 32;
  using Product = DenseProduct<Element, kTokens>;
  static constexpr int kValues = kTokens / 2;  // of a thread
  static constexpr bool kOfTokens = false;     // the rows of a product

  static constexpr int kXBox = kTokens * kBoxBytes;
  static constexpr int w_box(int box_rows) { return (box_rows + 7) / 8 * 8 * kBoxBytes; }
  static constexpr int stage(int box_rows) { return w_box(box_rows) + kXBox; }

  static constexpr int warpgroups(const DenseWalk& walk) { return (walk.box_rows + 63) / 64; }
  using Shared = DenseShared<kTokens, 64 * kMaxWarpgroups, kMaxStages>;
  // Of results that are exchanged, `bytes` for each row of the weight.
  static constexpr int exchange_pitch(int warpgroups, int bytes) { return warpgroups * 64 * bytes + 16; }

  // In floats: lanes of a warp, of eight rows and of every other token, store to banks of their own.
  static constexpr int sums_pitch(int warpgroups) { return warpgroups * 64 + 4; }
  static constexpr int kMostSumsBytes = kTokens * (64 * kMaxWarpgroups + 4) * 4;

  // A ring begins at a multiple of 1,024 bytes, and its last box is read up to the rows of the last warpgroup; behind
  // it results are exchanged.
  static constexpr int shared_bytes(const DenseWalk& walk, int stages) {
    const int read = warpgroups(walk) * 64 * kBoxBytes - w_box(walk.box_rows) - kXBox;
    const int exchanged = kTokens * exchange_pitch(warpgroups(walk), 2);
    return int(sizeof(Shared)) + 1024 + stages * stage(walk.box_rows) + (read > exchanged ? read : exchanged);
  }
};

// A product of 65 to 128 tokens with so many rows of the weight as columns.
template <class Element_, int kRows_>
struct WideTile {
  using Element = Element_;
  static constexpr int kTokens = 128, kRows = kRows_, kBoxBytes = 128;
  static constexpr int kMaxStages = 16, kMaxThreads = 2 * 128 + 32;
  using Product = DenseProduct<Element, kRows>;
  static constexpr int kValues = kRows / 2;
  static constexpr bool kOfTokens = true;
  static_assert(kRows % 16 == 0);

  static constexpr int kXBox = kTokens * kBoxBytes;
  static constexpr int w_box(int box_rows) { return (box_rows + 7) / 8 * 8 * kBoxBytes; }
  static constexpr int stage(int box_rows) { return w_box(box_rows) + kXBox; }
  static constexpr int warpgroups(const DenseWalk&) { return kTokens / 64; }
  using Shared = DenseShared<kTokens, kRows, kMaxStages>;

  static constexpr int exchange_pitch(int bytes) { return kRows * bytes + 16; }
  // In floats: half a warp, of four tokens and pairs of columns, stores to banks of its own.
  static constexpr int sums_pitch(int) { return kRows + 8; }
  static constexpr int kMostSumsBytes = kTokens * (kRows + 8) * 4;
  // Behind a ring, which is read no further than its last box of x, results are exchanged.
  static constexpr int shared_bytes(const DenseWalk& walk, int stages) {
    return int(sizeof(Shared)) + 1024 + stages * stage(walk.box_rows) + kTokens * exchange_pitch(2);
  }
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Of a matrix of rows of 128 bytes, swizzled: eight rows are 1,024 bytes.
__device__ __forceinline__ uint64_t rows_descriptor(uint32_t shared) {
  return uint64_t{(shared & 0x3ffff) >> 4} | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

template <class Product, int kValues, size_t... kIndex>
__device__ __forceinline__ void multiply_64_rows(uint64_t a, uint64_t b, float (&c)[kValues],
                                                 std::index_sequence<kIndex...>) {
  Product::fma(a, b, c[kIndex]...);
}

// The ring of a block.
template <class Tile>
struct DenseRing {
  using Barrier = cutlass::arch::ClusterBarrier;
  using Transactions = cutlass::arch::ClusterTransactionBarrier;

  uint32_t stages_at;
  int stages, w_box, stage_bytes;
  uint64_t *full, *empty;

  __device__ __forceinline__ void initialise(int warps) const {
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
      Transactions::init(full + s, 1);
      Barrier::init(empty + s, warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __device__ __forceinline__ uint32_t w_at(int stage) const { return stages_at + stage * stage_bytes; }
  __device__ __forceinline__ uint32_t x_at(int stage) const { return w_at(stage) + w_box; }
};

// What one thread copies.
template <class Tile, class Launch>
class DenseCopies {
 public:
  __device__ __forceinline__ DenseCopies(const Launch& launch, const DenseRing<Tile>& ring)
      : launch_(launch), ring_(ring) {}

  // All units of the block, a ring ahead. The first stages of the weight do not wait for x.
  __device__ __forceinline__ void run() const {
    const DenseWalk& walk = launch_.walk;
    int stage = 0, phase = 1, ahead = 0;
    bool waited = false;
    for (int unit = blockIdx.x; unit < walk.units(); unit += gridDim.x) {
      const int row = walk.first_row(walk.tile(unit)), slice = walk.slice(unit);
      const int begin = walk.first_chunk(slice), end = walk.first_chunk(slice + 1);
#pragma unroll 1
      for (int chunk = begin; chunk < end; ++chunk) {
        DenseRing<Tile>::Barrier::wait(ring_.empty + stage, phase);
        copy_w(stage, row, chunk);
        if (waited) copy_x(stage, chunk);
        ahead += !waited;
        if (++stage == ring_.stages) stage = 0, phase ^= 1;
        if (!waited && (ahead == ring_.stages || chunk + 1 == end)) {
          wait_for_predecessors();
          waited = true;
#pragma unroll 1
          for (int s = 0; s < ahead; ++s) copy_x(s, begin + s);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void copy_w(int stage, int row, int chunk) const {
    uint64_t* const full = ring_.full + stage;
    DenseRing<Tile>::Transactions::arrive_and_expect_tx(full, launch_.walk.box_rows * Tile::kBoxBytes + Tile::kXBox);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
        "%4}], [%2], %5;" ::"r"(ring_.w_at(stage)),
        "l"(&launch_.w), "r"(shared_address(full)), "r"(chunk * Tile::kBoxBytes), "r"(row), "l"(once_)
        : "memory");
  }
  __device__ __forceinline__ void copy_x(int stage, int chunk) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            ring_.x_at(stage)),
        "l"(&launch_.x), "r"(shared_address(ring_.full + stage)), "r"(chunk * Tile::kBoxBytes), "r"(0)
        : "memory");
  }

  const Launch& launch_;
  const DenseRing<Tile>& ring_;
  const uint64_t once_ = read_once_policy();
};

// Adds the products of the chunks of a unit to `c`; a warpgroup has 64 rows of one operand. Those of one chunk begin
// before those of the chunk in front of it are complete.
template <class Tile>
__device__ __forceinline__ void multiply_unit(const DenseRing<Tile>& ring, int warpgroup, int chunks, int& stage,
                                              int& phase, float (&c)[Tile::kValues]) {
  const auto release = [&](int of) {
    if (threadIdx.x % 32 == 0) DenseRing<Tile>::Barrier::arrive(ring.empty + of);
  };
  int before = -1;
#pragma unroll
  for (float& v : c) cute::warpgroup_fence_operand(v);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    DenseRing<Tile>::Barrier::wait(ring.full + stage, phase);
    cute::warpgroup_arrive();
    const int of_warpgroup = warpgroup * 64 * Tile::kBoxBytes;
    const uint64_t rows = rows_descriptor((Tile::kOfTokens ? ring.x_at(stage) : ring.w_at(stage)) + of_warpgroup);
    const uint64_t columns = rows_descriptor(Tile::kOfTokens ? ring.w_at(stage) : ring.x_at(stage));
#pragma unroll
    for (int k = 0; k < Tile::kBoxBytes / 32; ++k) {  // 32 bytes of K at a time
      multiply_64_rows<typename Tile::Product>(rows + 2 * k, columns + 2 * k, c,
                                               std::make_index_sequence<Tile::kValues>{});
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    if (before >= 0) release(before);
    before = stage;
    if (++stage == ring.stages) stage = 0, phase ^= 1;
  }
  cute::warpgroup_wait<0>();
  if (before >= 0) release(before);
#pragma unroll
  for (float& v : c) cute::warpgroup_fence_operand(v);
}

}  // namespace sparse24::cuda
