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

#include <algorithm>
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

// Of numbers that are not positive, within 8e-5 of it.
inline Vec exponential(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // Beyond -150 it is 0 in float32. The second of both is what is no number.
  const __m512 power = _mm512_mul_ps(_mm512_max_ps(_mm512_set1_ps(-150.f), x), _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(power, whole);
  __m512 sum = _mm512_fmadd_ps(rest, _mm512_set1_ps(.05508868f), _mm512_set1_ps(.24260405f));
  sum = _mm512_fmadd_ps(rest, sum, _mm512_set1_ps(.69327624f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(rest, sum, _mm512_set1_ps(.99992894f)), whole);
#else
  return x.exp_u20();
#endif
}

// codes = round(x * inverse) + zero, in 0 .. 255.
template <typename From>
void to_codes(const From* __restrict x, int64_t K, float inverse, float zero, uint8_t* __restrict codes) {
  int64_t k = 0;
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(zero)), none = _mm512_setzero_si512();
  for (; k + 16 <= K; k += 16) {
    const __m512i code = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(load_float(x + k), factor)), offset);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm512_cvtusepi32_epi8(_mm512_max_epi32(code, none)));
  }
#endif
  for (; k < K; ++k) {
    const float code = std::nearbyint(x[k] * inverse) + zero;
    codes[k] = static_cast<uint8_t>(static_cast<int32_t>(std::min(255.f, std::max(0.f, code))));
  }
}

inline void store_pair(const Vec& first, const Vec& second, float* to) {
  first.store(to);
  second.store(to + Vec::size());
}
inline void store_pair(const Vec& first, const Vec& second, at::BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  at::vec::convert_from_float<at::BFloat16>(first, second).store(to);
#endif
}

template <typename A, typename B>
float dot(const A* a, const B* b, int64_t D) {
  constexpr int64_t kChains = 4;  // one chain of sums would wait for itself
  Vec sums[kChains] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t d = 0;
  for (; d + kChains * Vec::size() <= D; d += kChains * Vec::size())
    for (int64_t i = 0; i < kChains; ++i) {
      const int64_t at = d + i * Vec::size();
      sums[i] = at::vec::fmadd(load_float(a + at), load_float(b + at), sums[i]);
    }
  for (; d + Vec::size() <= D; d += Vec::size())
    sums[0] = at::vec::fmadd(load_float(a + d), load_float(b + d), sums[0]);
  float out = d ? reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3])) : 0.f;
  for (; d < D; ++d) out += static_cast<float>(a[d]) * static_cast<float>(b[d]);
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

// to = from, K long.
inline void to_bfloat16(const float* from, int64_t K, at::BFloat16* to) {
  int64_t k = 0;
  for (; k + 2 * Vec::size() <= K; k += 2 * Vec::size())
    store_pair(Vec::loadu(from + k), Vec::loadu(from + k + Vec::size()), to + k);
  for (; k < K; ++k) to[k] = from[k];
}

// Ask for a row of K numbers that is read later.
inline void prefetch_row(const float* row, int64_t K) {
  constexpr int64_t kLine = 16;
  for (int64_t k = 0; k < K; k += kLine) __builtin_prefetch(row + k, 0, 2);
}

// Calls back with the first of each vector of K numbers, then with each number that is left.
template <typename Vectors, typename Numbers>
void each_vector(int64_t K, Vectors&& vectors, Numbers&& numbers) {
  int64_t k = 0;
  for (; k + Vec::size() <= K; k += Vec::size()) vectors(k);
  for (; k < K; ++k) numbers(k);
}

// y = norm(a + b) * weight + bias, each K long.
inline void add_norm(const float* a, const float* b, int64_t K, const float* weight, const float* bias,
                     float epsilon, float* y) {
  Vec sums(0.f), squares(0.f);
  float sum = 0, square = 0;
  each_vector(
      K,
      [&](int64_t k) {
        const Vec v = Vec::loadu(a + k) + Vec::loadu(b + k);
        v.store(y + k);
        sums = sums + v;
      },
      [&](int64_t k) { sum += y[k] = a[k] + b[k]; });
  const float mean = (sum + reduce_sum(sums)) / K;
  each_vector(
      K,
      [&](int64_t k) {
        const Vec v = Vec::loadu(y + k) - Vec(mean);
        squares = at::vec::fmadd(v, v, squares);
      },
      [&](int64_t k) { square += (y[k] - mean) * (y[k] - mean); });
  const float factor = 1.f / std::sqrt((square + reduce_sum(squares)) / K + epsilon);
  each_vector(
      K,
      [&](int64_t k) {
        const Vec v = (Vec::loadu(y + k) - Vec(mean)) * Vec(factor);
        at::vec::fmadd(v, Vec::loadu(weight + k), Vec::loadu(bias + k)).store(y + k);
      },
      [&](int64_t k) { y[k] = (y[k] - mean) * factor * weight[k] + bias[k]; });
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
