// Activations of vectors. Each is a kind of its own, so that a loop over rows holds the constants of
// one and asks nothing.
#pragma once

#include "vectors.h"

#include <array>
#include <cmath>

namespace moe_dist {

struct Identity {
  Vec operator()(const Vec& x) const { return x; }
};

struct TanhGelu {
  Vec operator()(const Vec& x) const {
    const Vec inner = Vec(.79788456f) * (x + Vec(.044715f) * x * x * x);
    return x * Vec(.5f) * (Vec(1.f) + inner.tanh());
  }
};

struct Relu {
  Vec operator()(const Vec& x) const { return at::vec::maximum(x, Vec(0.f)); }
};

struct Silu {
  Vec operator()(const Vec& x) const { return x / (Vec(1.f) + x.neg().exp_u20()); }
};

struct Tanh {
  Vec operator()(const Vec& x) const { return x.tanh(); }
};

#if defined(CPU_CAPABILITY_AVX512)

// The normal distribution from -x down, by a cubic in each of 32 parts of x in [0, 5.56], within 3e-7.
struct NormalTail {
  static constexpr float kPartsOfOne = 5.75f, kEnd = 31.998f / kPartsOfOne;
  alignas(64) std::array<std::array<float, 32>, 4> coefficients;

  // Through four points of each part; those of Chebyshev have the smallest error.
  NormalTail() {
    constexpr double kPoints[] = {.038060233744356, .308658283817455, .691341716182545, .961939766255644};
    for (int part = 0; part < 32; ++part) {
      double divided[4];
      for (int i = 0; i < 4; ++i) divided[i] = .5 * std::erfc((part + kPoints[i]) / kPartsOfOne * std::sqrt(.5));
      for (int step = 1; step < 4; ++step)
        for (int i = 3; i >= step; --i) divided[i] = (divided[i] - divided[i - 1]) / (kPoints[i] - kPoints[i - step]);
      double sum[4] = {divided[3], 0, 0, 0};
      for (int i = 2; i >= 0; --i) {
        for (int power = 3; power >= 1; --power) sum[power] = sum[power - 1] - kPoints[i] * sum[power];
        sum[0] = divided[i] - kPoints[i] * sum[0];
      }
      for (int power = 0; power < 4; ++power) coefficients[power][part] = static_cast<float>(sum[power]);
    }
  }
};

inline const NormalTail kNormalTail;

// x * (1 - tail(x)), in a third of the time that an exponential and a division take.
class Gelu {
 public:
  Gelu() {
    for (int power = 0; power < 4; ++power)
      for (int half = 0; half < 2; ++half)
        tables_[power][half] = _mm512_load_ps(kNormalTail.coefficients[power].data() + 16 * half);
  }

  Vec operator()(const Vec& x) const {
    const __m512 size = size_of(x);
    return _mm512_fnmadd_ps(size, tail_of(size), _mm512_max_ps(x, _mm512_setzero_ps()));
  }

  // The normal distribution up to x.
  Vec distribution(const Vec& x) const {
    const __m512 tail = tail_of(size_of(x));
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(1.f), tail), negative, tail);
  }

 private:
  // A second operand that is no number is what a minimum gives.
  static __m512 size_of(const Vec& x) { return _mm512_min_ps(_mm512_set1_ps(NormalTail::kEnd), _mm512_abs_ps(x)); }

  __m512 tail_of(__m512 size) const {
    const __m512 place = _mm512_mul_ps(size, _mm512_set1_ps(NormalTail::kPartsOfOne));
    const __m512 rest = _mm512_sub_ps(place, _mm512_roundscale_ps(place, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));
    const __m512i part = _mm512_cvttps_epi32(place);
    __m512 tail = of(3, part);
    for (int power = 2; power >= 0; --power) tail = _mm512_fmadd_ps(tail, rest, of(power, part));
    return tail;
  }

  __m512 of(int power, __m512i part) const {
    return _mm512_permutex2var_ps(tables_[power][0], part, tables_[power][1]);
  }

  __m512 tables_[4][2];
};

#else

struct Gelu {
  Vec operator()(const Vec& x) const { return x * Vec(.5f) * (Vec(1.f) + error_function(x * Vec(.70710678f))); }

 private:
  // Within 2e-7; torch's own takes twice the time. Abramowitz and Stegun, 7.1.26.
  static Vec error_function(const Vec& x) {
    const Vec size = x.abs(), t = Vec(1.f) / at::vec::fmadd(Vec(.3275911f), size, Vec(1.f));
    Vec sum = at::vec::fmadd(Vec(1.061405429f), t, Vec(-1.453152027f));
    sum = at::vec::fmadd(sum, t, Vec(1.421413741f));
    sum = at::vec::fmadd(sum, t, Vec(-.284496736f));
    sum = at::vec::fmadd(sum, t, Vec(.254829592f));
    const Vec positive = Vec(1.f) - sum * t * (size * size).neg().exp_u20();
    return Vec::blendv(positive, positive.neg(), x < Vec(0.f));
  }
};

#endif

// Call back with the activation of a number, see routed_ffn.py; -1 is none.
template <typename Function>
void with_activation(int64_t number, Function&& function) {
  switch (number) {
    case -1: return function(Identity());
    case 0: return function(Gelu());
    case 1: return function(TanhGelu());
    case 2: return function(Relu());
    case 3: return function(Silu());
    default: return function(Tanh());
  }
}

}  // namespace moe_dist
