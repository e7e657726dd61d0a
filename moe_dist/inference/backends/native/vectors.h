// Vectors of float32 as wide as this machine has them.
#pragma once

// Headers of torch ask for these, the compiler says what it was told to compile for.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#endif

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstring>

namespace moe_dist {

using Vec = at::vec::Vectorized<float>;

inline float reduce_sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, v);
}
inline float reduce_min(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::minimum(a, b); }, v);
}
inline float reduce_max(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, v);
}

inline Vec load_float(const float* from) { return Vec::loadu(from); }
inline Vec load_float(const int32_t* from) {
  return at::vec::convert<float>(at::vec::Vectorized<int32_t>::loadu(from));
}

inline Vec load_float(const at::BFloat16* from) {
  Vec out;
  at::vec::load_fp32_from_bf16(from, out);
  return out;
}

// codes = round(x * inverse) + zero, in 0 .. 255.
inline void to_codes(const float* __restrict x, int64_t K, float inverse, float zero, uint8_t* __restrict codes) {
  int64_t k = 0;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(zero)), none = _mm512_setzero_si512();
  for (; k + 16 <= K; k += 16) {
    const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor)), offset);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, none)));
  }
#endif
  for (; k < K; ++k) {
    const float code = std::nearbyint(x[k] * inverse) + zero;
    codes[k] = static_cast<uint8_t>(static_cast<int32_t>(std::min(255.f, std::max(0.f, code))));
  }
}

// Within 2e-7; torch's own takes twice the time. Abramowitz and Stegun, 7.1.26.
inline Vec error_function(const Vec& x) {
  const Vec size = x.abs(), t = Vec(1.f) / at::vec::fmadd(Vec(.3275911f), size, Vec(1.f));
  Vec sum = at::vec::fmadd(Vec(1.061405429f), t, Vec(-1.453152027f));
  sum = at::vec::fmadd(sum, t, Vec(1.421413741f));
  sum = at::vec::fmadd(sum, t, Vec(-.284496736f));
  sum = at::vec::fmadd(sum, t, Vec(.254829592f));
  const Vec positive = Vec(1.f) - sum * t * (size * size).neg().exp_u20();
  return Vec::blendv(positive, positive.neg(), x < Vec(0.f));
}

// The activation of a number, see routed_ffn.py; -1 is none.
inline Vec activated(const Vec& x, int64_t number) {
  switch (number) {
    case -1: return x;
    case 0: return x * Vec(.5f) * (Vec(1.f) + error_function(x * Vec(.70710678f)));
    case 1: {
      const Vec inner = Vec(.79788456f) * (x + Vec(.044715f) * x * x * x);
      return x * Vec(.5f) * (Vec(1.f) + inner.tanh());
    }
    case 2: return at::vec::maximum(x, Vec(0.f));
    case 3: return x / (Vec(1.f) + x.neg().exp_u20());
    default: return x.tanh();
  }
}

inline void store_pair(const Vec& first, const Vec& second, float* to) {
  first.store(to);
  second.store(to + Vec::size());
}
inline void store_pair(const Vec& first, const Vec& second, at::BFloat16* to) {
  at::vec::convert_from_float<at::BFloat16>(first, second).store(to);
}

template <typename T>
float dot(const float* a, const T* b, int64_t D) {
  constexpr int64_t kChains = 4;  // one chain of sums would wait for itself
  Vec sums[kChains] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t d = 0;
  for (; d + kChains * Vec::size() <= D; d += kChains * Vec::size())
    for (int64_t i = 0; i < kChains; ++i) {
      const int64_t at = d + i * Vec::size();
      sums[i] = at::vec::fmadd(Vec::loadu(a + at), load_float(b + at), sums[i]);
    }
  for (; d + Vec::size() <= D; d += Vec::size())
    sums[0] = at::vec::fmadd(Vec::loadu(a + d), load_float(b + d), sums[0]);
  float out = d ? reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) : 0.f;
  for (; d < D; ++d) out += a[d] * static_cast<float>(b[d]);
  return out;
}

// to = sum of weights[j] * rows[j], which are D long.
template <typename T>
void mix(const float* weights, const T* rows, int64_t count, int64_t D, float* to) {
  constexpr int64_t kVectors = 4;
  int64_t d = 0;
  for (; d + kVectors * Vec::size() <= D; d += kVectors * Vec::size()) {
    Vec sums[kVectors] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
    for (int64_t j = 0; j < count; ++j)
      for (int64_t i = 0; i < kVectors; ++i)
        sums[i] = at::vec::fmadd(Vec(weights[j]), load_float(rows + j * D + d + i * Vec::size()), sums[i]);
    for (int64_t i = 0; i < kVectors; ++i) sums[i].store(to + d + i * Vec::size());
  }
  for (; d < D; ++d) {
    to[d] = 0;
    for (int64_t j = 0; j < count; ++j) to[d] += weights[j] * static_cast<float>(rows[j * D + d]);
  }
}

// y = norm(a + b) * weight + bias, each K long; b may be null.
inline void add_norm(const float* a, const float* b, int64_t K, const float* weight,
                     const float* bias, float epsilon, float* y) {
  float sum = 0, squares = 0;
  for (int64_t k = 0; k < K; ++k) y[k] = b ? a[k] + b[k] : a[k];
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < K; ++k) sum += y[k];
  const float mean = sum / K;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < K; ++k) squares += (y[k] - mean) * (y[k] - mean);
  const float factor = 1.f / std::sqrt(squares / K + epsilon);
  for (int64_t k = 0; k < K; ++k) y[k] = (y[k] - mean) * factor * weight[k] + bias[k];
}

// y = x / (root of its mean square) * weight, each K long.
inline void rms_norm(const float* __restrict x, int64_t K, const float* __restrict weight, float epsilon,
                     float* __restrict y) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < K; ++k) squares += x[k] * x[k];
  const float factor = 1.f / std::sqrt(squares / K + epsilon);
  for (int64_t k = 0; k < K; ++k) y[k] = x[k] * factor * weight[k];
}

}  // namespace moe_dist
