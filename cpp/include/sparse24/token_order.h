/// @file
/// The other order of tokens in which groups of four are formed: neighbouring tokens light the same features.
#pragma once

#include "sparse24/types.h"

namespace sparse24 {

/// The token in row `row` of an interleaved matrix, `quarter` = tokens / 4: groups of four rows are tokens a quarter
/// apart, and the last tokens % 4 rows stay where they are. With a quarter of 0 all do.
SPARSE24_HD constexpr int64_t interleaved_token(int64_t row, int64_t quarter) {
  return row < 4 * quarter ? row % 4 * quarter + row / 4 : row;
}

}  // namespace sparse24
