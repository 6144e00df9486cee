/// @file
/// What the ops of experts have in common: the offsets, and weights with an expert's matrix each.
#pragma once

#include "tensor.h"

namespace sparse24::torch_ops {

/// Checks offsets int32 [experts] for `rows` rows of `x`; and weights [experts, ...] called `w_name`.
Experts check_experts(OpName op, const Tensor& offsets, const char* w_name, const Tensor& w, const Tensor& x,
                      int64_t rows);
Experts check_offsets(OpName op, const Tensor& offsets, const Tensor& x, int64_t rows);
/// Checks scales of the weights of experts: [experts, n], or [experts].
void check_weight_scale(OpName op, const char* argument, const std::optional<Tensor>& scale, int64_t experts, int64_t n,
                        const Tensor& x);
/// Whether there is a scale for each row, and not one for all.
inline bool is_per_row_of(const Tensor& scale, int64_t rows) { return rows != 1 && scale.numel() == rows; }

}  // namespace sparse24::torch_ops
