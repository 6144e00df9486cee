/// @file
/// The activations, defined once: what is applied to a pre-activation h before two of four are selected.
#pragma once

namespace sparse24 {

/// h, max(h, 0) or max(h, 0)^2.
enum class Activation { kNone, kRelu, kRelu2 };

/// An activation as it travels from an op to the kernels, with all that it depends on.
struct ActivationArgs {
  Activation kind;

  ActivationArgs(Activation kind = Activation::kNone) : kind(kind) {}

  /// What orders as y does. Squaring keeps the order of what relu leaves, and could only underflow or overflow into
  /// ties: it is left out where magnitudes are compared. relu keeps NaN, as torch does, and turns -0 into +0.
  float root(float h) const {
    if (kind == Activation::kNone) return h;
    return h > 0.0f || h != h ? h : 0.0f;
  }
  /// y of h, in fp32.
  float value(float h) const { return kind == Activation::kRelu2 ? root(h) * root(h) : root(h); }
};

}  // namespace sparse24
