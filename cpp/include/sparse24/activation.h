/// @file
/// The activations, defined once: what is applied to a pre-activation h before two of four are selected.
#pragma once

#include <cfloat>
#include <cmath>

#include "sparse24/error.h"

namespace sparse24 {

/// h, max(h, 0) or max(h, 0)^2; with a threshold, of an h that exceeds it, and else 0.
enum class Activation { kNone, kRelu, kRelu2 };

/// An activation as it travels from an op to the kernels, with all that it depends on.
struct ActivationArgs {
  Activation kind;
  float threshold;  ///< finite and not negative; kNone has 0

  ActivationArgs(Activation kind = Activation::kNone, float threshold = 0) : kind(kind), threshold(threshold) {}

  /// The same with a threshold of the user's, checked. `op`: what the sentence of an error begins with.
  ActivationArgs above(const char* op, double threshold) const {
    check(threshold >= 0 && std::isfinite(threshold), op, ": expected threshold to be finite and at least 0, got ",
          threshold);
    check(threshold == 0 || kind != Activation::kNone, op, ": expected threshold to be 0 (activation \"none\"), got ",
          threshold);
    return {kind, threshold < FLT_MAX ? static_cast<float>(threshold) : FLT_MAX};
  }

  /// What orders as y does. Squaring keeps the order of what relu leaves, and could only underflow or overflow into
  /// ties: it is left out where magnitudes are compared. relu keeps NaN, as torch does, and turns -0 into +0.
  float root(float h) const {
    if (kind == Activation::kNone) return h;
    return h > threshold || h != h ? h : 0.0f;
  }
  /// y of h, in fp32.
  float value(float h) const { return kind == Activation::kRelu2 ? root(h) * root(h) : root(h); }
};

}  // namespace sparse24
