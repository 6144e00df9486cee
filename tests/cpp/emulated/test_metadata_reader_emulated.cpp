/// @file
/// The metadata of a product with a 2:4 weight in tiles of one warpgroup: a thread gets what format.h says of the rows
/// and columns that wgmma asks it for, and the lanes of a warp read it without conflicts of banks.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "emulator/ptx.h"
// After it.
#include "gemm/sm90/mainloops/metadata_reader.cuh"
#include "sparse24/format.h"
#include "sparse24/packed.h"

namespace sparse24::emulate {
namespace {

using cute::Int;

constexpr int kThreads = 128, kTileM = 128, kBankBytes = 4, kBanks = 32;

template <bool kGroupsTokens_, DType kDType_>
struct Of {
  static constexpr bool kGroupsTokens = kGroupsTokens_;
  static constexpr DType kDType = kDType_;
};
using Readers = testing::Types<Of<false, DType::kBFloat16>, Of<true, DType::kBFloat16>, Of<false, DType::kFloat8E4M3>,
                               Of<true, DType::kFloat8E4M3>>;

template <class Case>
class MetadataReaderEmulated : public testing::Test {
 protected:
  static constexpr bool kFp8 = Case::kDType == DType::kFloat8E4M3;
  static constexpr int kTileK = int(meta_atom_k(Case::kDType));
  using Reader = cuda::MetadataReader<Case::kGroupsTokens, kFp8>;
  const Operand operand_ = Operand::of(kTileM, kTileK, Case::kDType, Dim::kFeatures);

  /// What a thread reads of a stage: words of 64 rows h and mma k at 2 k + h.
  static std::vector<uint32_t> read(const std::vector<uint32_t>& stage, int thread) {
    const Reader reader(thread, 0);
    typename Reader::Words words;
    reader.load(reinterpret_cast<const uint8_t*>(stage.data()), words);
    auto metadata = cute::make_tensor<uint8_t>(cute::make_shape(Int<4>{}, Int<2>{}, Int<2>{}));
    reader.arrange(words, metadata);
    std::vector<uint32_t> out(4);
    std::memcpy(out.data(), metadata.data(), sizeof(uint32_t) * out.size());
    return out;
  }
  /// The row of the packed weight that row 64 h + 16 w + 8 e + g of a tile is (mainloops/grouped_sparse.cuh).
  static int64_t row_of(int h, int w, int e, int g) {
    const int64_t feature = 32 * w + 4 * g + 2 * h + e;
    return Case::kGroupsTokens ? feature : packed_row(feature);
  }
  /// The nibbles of so many groups of a row from a column on, lowest first.
  uint32_t nibbles(const uint8_t* meta, int64_t row, int64_t column, int groups) const {
    uint32_t out = 0;
    for (int i = 0; i < groups; ++i) {
      const int64_t g = column / 4 + i;
      out |= (meta[operand_.meta_byte(row, g)] >> Operand::meta_shift(g) & 0xFu) << 4 * i;
    }
    return out;
  }
};
TYPED_TEST_SUITE(MetadataReaderEmulated, Readers);

TYPED_TEST(MetadataReaderEmulated, ReadsWhatTheInstructionAsksFor) {
  std::mt19937 random(1);
  std::vector<uint32_t> stage(size_t(this->operand_.meta_bytes()) / sizeof(uint32_t));
  for (uint32_t& word : stage) word = random();
  const auto* meta = reinterpret_cast<const uint8_t*>(stage.data());
  for (int thread = 0; thread < kThreads; ++thread) {
    const int w = thread / 32, g = thread % 32 / 4, q = thread % 4;
    const std::vector<uint32_t> got = this->read(stage, thread);
    for (int k = 0; k < 2; ++k) {
      for (int h = 0; h < 2; ++h) {
        uint32_t expected;
        if constexpr (TestFixture::kFp8) {
          expected = this->nibbles(meta, this->row_of(h, w, q % 2, g), 64 * k + 32 * (q / 2), 8);
        } else {
          const int column = 32 * k + 16 * (q % 2);
          expected = this->nibbles(meta, this->row_of(h, w, 0, g), column, 4) |
                     this->nibbles(meta, this->row_of(h, w, 1, g), column, 4) << 16;
        }
        ASSERT_EQ(got[2 * k + h], expected) << "thread " << thread << ", rows " << h << ", mma " << k;
      }
    }
  }
}

/// A stage of word numbers shows which words an instruction loads. 4 bytes a lane are loaded for a warp at once, 16
/// bytes for eight lanes.
TYPED_TEST(MetadataReaderEmulated, LoadsWithoutConflictsOfBanks) {
  using Reader = typename TestFixture::Reader;
  constexpr int kLanes = TestFixture::kFp8 ? 32 : 8, kOfLoad = 32 / kLanes;
  std::vector<uint32_t> stage(size_t(this->operand_.meta_bytes()) / kBankBytes);
  for (size_t i = 0; i < stage.size(); ++i) stage[i] = uint32_t(i);
  constexpr int kLoads = int(sizeof(typename Reader::Words)) / kBankBytes / kOfLoad;
  for (int first = 0; first < kThreads; first += kLanes) {
    std::set<uint32_t> of_load[kLoads];
    for (int thread = first; thread < first + kLanes; ++thread) {
      typename Reader::Words words;
      Reader(thread, 0).load(reinterpret_cast<const uint8_t*>(stage.data()), words);
      uint32_t loaded[kLoads * kOfLoad];
      std::memcpy(loaded, &words, sizeof loaded);
      for (int i = 0; i < kLoads * kOfLoad; ++i) of_load[i / kOfLoad].insert(loaded[i]);
    }
    for (const auto& words : of_load) {
      std::set<uint32_t> banks;
      for (uint32_t word : words) banks.insert(word % kBanks);
      ASSERT_EQ(banks.size(), words.size()) << "threads from " << first;
    }
  }
}

}  // namespace
}  // namespace sparse24::emulate
