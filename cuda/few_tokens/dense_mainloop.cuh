// The mainloop of a dense product of few tokens: the weight is the operand of 64 rows of wgmma, tokens are its columns.
//
// One thread copies chunks of the weight and of x to a ring in shared memory by the TMA; each warpgroup multiplies 64
// rows. What is read of a ring beyond the rows of a tile is multiplied too, and not used.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/mma_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/numeric/integral_constant.hpp>
#include <utility>

#include "few_tokens/asynchronous.cuh"
#include "few_tokens/dense_few.h"

namespace sparse24::cuda {

// A product of so many columns of tokens.
template <class Element_, int kTokens_>
struct DenseTile {
  using Element = Element_;
  static constexpr int kTokens = kTokens_, kBoxBytes = 128;  // a chunk of K
  static constexpr int kMaxWarpgroups = 3, kMaxStages = 16;
  static constexpr int kMaxThreads = 128 * kMaxWarpgroups + 32;
  using Product = decltype(cute::SM90::GMMA::ss_op_selector<
                           Element, Element, float,
                           cute::Shape<cute::_64, cute::Int<kTokens>, cute::Int<32 / int(sizeof(Element))>>>());

  static constexpr int kXBox = kTokens * kBoxBytes;
  static constexpr int w_box(int box_rows) { return (box_rows + 7) / 8 * 8 * kBoxBytes; }
  static constexpr int stage(int box_rows) { return w_box(box_rows) + kXBox; }

  // What is in shared memory in front of the ring.
  struct Shared {
    alignas(8) uint64_t full[kMaxStages], empty[kMaxStages];
    float of_tokens[2][kTokens], of_rows[2][64 * kMaxWarpgroups];
  };
  // Results of so many tokens are exchanged at a time, in rows of 2 bytes a row of the weight at the most.
  static constexpr int kExchanged = kTokens < 64 ? kTokens : 64;
  static constexpr int exchange_pitch(int warpgroups, int bytes) { return warpgroups * 64 * bytes + 16; }

  // In floats: lanes of a warp, of eight rows and of every other token, store to banks of their own.
  static constexpr int sums_pitch(int warpgroups) { return warpgroups * 64 + 4; }
  static constexpr int kMostSumsBytes = kTokens * (64 * kMaxWarpgroups + 4) * 4;

  // A ring begins at a multiple of 1,024 bytes, and its last box is read up to the rows of the last warpgroup; behind
  // it results are exchanged.
  static constexpr int shared_bytes(const DenseWalk& walk, int stages) {
    const int read = walk.warpgroups() * 64 * kBoxBytes - w_box(walk.box_rows) - kXBox;
    const int exchanged = kExchanged * exchange_pitch(walk.warpgroups(), 2);
    return int(sizeof(Shared)) + 1024 + stages * stage(walk.box_rows) + (read > exchanged ? read : exchanged);
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

// Adds the products of the chunks of a unit to `c`; a warpgroup has 64 rows. Those of one chunk begin before those of
// the chunk in front of it are complete.
template <class Tile>
__device__ __forceinline__ void multiply_unit(const DenseRing<Tile>& ring, int warpgroup, int chunks, int& stage,
                                              int& phase, float (&c)[Tile::kTokens / 2]) {
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
    const uint64_t w = rows_descriptor(ring.w_at(stage) + warpgroup * 64 * Tile::kBoxBytes);
    const uint64_t x = rows_descriptor(ring.x_at(stage));
#pragma unroll
    for (int k = 0; k < Tile::kBoxBytes / 32; ++k) {  // 32 bytes of K at a time
      multiply_64_rows<typename Tile::Product>(w + 2 * k, x + 2 * k, c, std::make_index_sequence<Tile::kTokens / 2>{});
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
