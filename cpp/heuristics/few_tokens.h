/// @file
/// How many tokens are few: up to how many a network whose W2 is stored by neuron runs as relu2_mlp_few, and beyond
/// that, or without such a W2, as relu2_mlp_dense.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sparse24 {

/// Of one network [d_model, d_ff, d_model] with weights of `bits`. The choice itself is made in Python, where a
/// compiler traces it: exactly such a network's row, or that of the nearest one.
struct FewTokensRow {
  int bits;
  int64_t d_model, d_ff;
  int64_t tokens;  ///< the most that run as relu2_mlp_few; 0: none
  int64_t dense;   ///< the most that run as relu2_mlp_dense; 0: none
  std::string record;
};

/// Those of heuristics/few_tokens.inc.
const std::vector<FewTokensRow>& few_tokens_rows();

}  // namespace sparse24
