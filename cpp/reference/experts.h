/// @file
/// What the references of the products of experts share: one expert after the other.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sparse24/experts.h"

namespace sparse24::cpu {

/// The rows of one expert.
struct ExpertGroup {
  int64_t expert, begin, rows;
  int64_t padded_row;  ///< where they begin in an operand of padded rows
};

/// Calls `each` for every expert that has rows, and returns where the rows of the last end.
template <class Each>
int64_t for_each_expert(const Experts& experts, const Each& each) {
  int64_t begin = 0, padded_row = 0;
  for (int64_t e = 0; e < experts.count; ++e) {
    const int64_t end = std::max(begin, std::min<int64_t>(experts.offsets[e], experts.rows));
    if (end > begin) each(ExpertGroup{e, begin, end - begin, padded_row});
    padded_row += round_up(end - begin, kExpertRows);
    begin = end;
  }
  return begin;
}

template <class T>
T* at(T* start, int64_t bytes) {
  return static_cast<T*>(static_cast<std::conditional_t<std::is_const_v<T>, const char*, char*>>(start) + bytes);
}

}  // namespace sparse24::cpu
