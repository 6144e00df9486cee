/// @file
/// Groups of four of a sparse operand and their nibbles in the metadata.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/parallel.h"
#include "reference/activate.h"
#include "sparse24/format.h"

namespace sparse24 {

/// Calls `group(m, g)` for every stored group. Threads never share a byte of metadata, which holds two neighbouring
/// groups.
template <class Group>
void for_each_group(const Operand& a, const Group& group) {
  const int64_t groups = a.k_values / 4;
  if (a.dim == Dim::kFeatures) {
    parallel_for(a.m, 4 * groups, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t g = 0; g < groups; ++g) group(m, g);
      }
    });
  } else {
    parallel_for(ceil_div(groups, 2), 8 * a.m, [&](int64_t begin, int64_t end) {
      for (int64_t g = 2 * begin; g < std::min(2 * end, groups); ++g) {
        for (int64_t m = 0; m < a.m; ++m) group(m, g);
      }
    });
  }
}

/// Returns the positions that group g of row m keeps.
inline Pair read_pair(const uint8_t* meta, const Operand& a, int64_t m, int64_t g) {
  const int nibble = meta[a.meta_byte(m, g)] >> Operand::meta_shift(g);
  return {nibble & 3, nibble >> 2 & 3};
}

inline void write_pair(uint8_t* meta, const Operand& a, int64_t m, int64_t g, Pair pair) {
  uint8_t& byte = meta[a.meta_byte(m, g)];
  const int shift = Operand::meta_shift(g);
  byte = static_cast<uint8_t>((byte & ~(0xF << shift)) | pair.nibble() << shift);
}

/// Returns the pattern of `from` in the layout of `to`, an operand of the same sizes.
inline void convert_meta(const uint8_t* from_meta, const Operand& from, uint8_t* to_meta, const Operand& to) {
  std::memset(to_meta, kMetaPaddingByte, static_cast<size_t>(to.meta_bytes()));
  for_each_group(to, [&](int64_t m, int64_t g) { write_pair(to_meta, to, m, g, read_pair(from_meta, from, m, g)); });
}

}  // namespace sparse24
