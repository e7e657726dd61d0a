// Activations with their slopes, of vectors.
#pragma once

#include "activations.h"

namespace moe_dist {

struct Slope {
  Vec value, slope;
};

inline Slope with_slope(const Silu&, const Vec& x) {
  const Vec one(1.f), sigmoid = one / (one + x.neg().exp_u20()), value = x * sigmoid;
  return {value, at::vec::fmadd(value, one - sigmoid, sigmoid)};
}

inline Slope with_slope(const Relu&, const Vec& x) {
  const Vec zero(0.f);
  return {at::vec::maximum(x, zero), Vec::blendv(zero, Vec(1.f), x > zero)};
}

inline Slope with_slope(const Tanh&, const Vec& x) {
  const Vec value = x.tanh();
  return {value, Vec(1.f) - value * value};
}

inline Slope with_slope(const TanhGelu&, const Vec& x) {
  const Vec one(1.f), half(.5f), root(.79788456f), square = x * x;
  const Vec tanh = (root * x * at::vec::fmadd(Vec(.044715f), square, one)).tanh(), share = half * (one + tanh);
  const Vec inner = root * at::vec::fmadd(Vec(.134145f), square, one);
  return {x * share, at::vec::fmadd(half * x * (one - tanh * tanh), inner, share)};
}

#if defined(CPU_CAPABILITY_AVX512)
inline Slope with_slope(const Gelu& gelu, const Vec& x) {
  const Vec share = gelu.distribution(x), density = Vec(.39894228f) * (x * x * Vec(-.5f)).exp_u20();
  return {x * share, at::vec::fmadd(x, density, share)};
}
#endif

// Call back with the activation of a number, as `with_activation` does, but not with none.
template <typename Function>
void with_slopes(int64_t number, Function&& function) {
  switch (number) {
#if defined(CPU_CAPABILITY_AVX512)
    case 0: return function(Gelu());
#endif
    case 1: return function(TanhGelu());
    case 2: return function(Relu());
    case 3: return function(Silu());
    default: return function(Tanh());
  }
}

}  // namespace moe_dist
