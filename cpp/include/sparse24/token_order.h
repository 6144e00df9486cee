/// @file
/// The other order of tokens in which groups of four are formed, because neighbouring tokens use the same features.
#pragma once

#include "sparse24/types.h"

namespace sparse24 {

/// Returns the token in row `row` of an interleaved matrix, with `quarter` = tokens / 4. The four rows of a group are
/// tokens that lie a quarter of all tokens apart; the last tokens % 4 rows stay where they are, and with a quarter of 0
/// all rows do.
SPARSE24_HD constexpr int64_t interleaved_token(int64_t row, int64_t quarter) {
  return row < 4 * quarter ? row % 4 * quarter + row / 4 : row;
}

/// Returns where the last rows begin that do not fill a tile of `tile` rows, which is a multiple of four.
///
/// A tensor map finds the rows of whole tiles where they lie. Of the last ones, groups may end within what a copy
/// takes, so the kernels are given a copy of these few in the order that they are multiplied in.
SPARSE24_HD constexpr int64_t first_of_tail(int64_t rows, int64_t tile) { return rows / tile * tile; }

}  // namespace sparse24
