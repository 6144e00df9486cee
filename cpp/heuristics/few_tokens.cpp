// The measured numbers of few tokens.
#include "heuristics/few_tokens.h"

namespace sparse24 {

const std::vector<FewTokensRow>& few_tokens_rows() {
  static const std::vector<FewTokensRow> rows = {
#include "heuristics/few_tokens.inc"
  };
  return rows;
}

}  // namespace sparse24
