// Products of a few rows with a block of outputs, where reading the weights is all the work: no
// kernel is looked up, no tile set up. A weight's block lies as `Linear` packs it: 256 bytes for
// each word of four bytes of a row, which holds one float32, two bfloat16 or four codes of int8.
#pragma once

#include "vectors.h"

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>

namespace moe_dist {

constexpr int64_t kFewRows = 4;

// Products of bfloat16 are slower here than in tiles, which are as fast for 16 rows as for three.
template <typename A>
constexpr int64_t kMostRows = std::is_same_v<A, at::BFloat16> ? 2 : kFewRows;

#if defined(CPU_CAPABILITY_AVX512)

// How a word of a row is multiplied with 16 outputs and added to their sums.
template <typename A>
struct Lanes {
  static constexpr bool exist = false;
};

template <>
struct Lanes<float> {
  static constexpr bool exist = true;
  using Sum = __m512;
  static Sum none() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i word, __m512i weights) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(word), _mm512_castsi512_ps(weights), sum);
  }
  static Sum both(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static void store(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Lanes<at::BFloat16> : Lanes<float> {
  static Sum add(Sum sum, __m512i word, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)word, (__m512bh)weights);
  }
};
#endif

#if defined(__AVX512VNNI__)
template <>
struct Lanes<uint8_t> {
  static constexpr bool exist = true;
  using Sum = __m512i;
  static Sum none() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, __m512i word, __m512i weights) {
    return _mm512_dpbusd_epi32(sum, word, weights);
  }
  static Sum both(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static void store(int32_t* to, Sum sum) { _mm512_storeu_si512(to, sum); }
};
#endif

// c (M, 64) = a (M, words) x b (words, 64). Nothing is fetched ahead by instructions: the processor
// does it by itself, and they take its room.
template <int M, typename A, typename C>
void multiply_rows(const char* a, const char* b, int64_t words, C* c) {
  using L = Lanes<A>;
  constexpr int kAtOnce = M == 1 ? 2 : 1;  // one chain of sums would wait for itself
  typename L::Sum sums[kAtOnce][M][4];
  for (auto& one : sums)
    for (auto& row : one)
      for (auto& sum : row) sum = L::none();
  const auto add = [&](int64_t word, auto& own) {
    const char* weights = b + word * 256;
    for (int n = 0; n < 4; ++n) {
      const __m512i w = _mm512_loadu_si512(weights + n * 64);
      for (int m = 0; m < M; ++m) {
        int32_t value;
        std::memcpy(&value, a + (m * words + word) * 4, 4);
        own[m][n] = L::add(own[m][n], _mm512_set1_epi32(value), w);
      }
    }
  };
  int64_t word = 0;
  for (; word + kAtOnce <= words; word += kAtOnce)
    for (int i = 0; i < kAtOnce; ++i) add(word + i, sums[i]);
  for (; word < words; ++word) add(word, sums[0]);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 4; ++n) {
      auto sum = sums[0][m][n];
      if constexpr (kAtOnce == 2) sum = L::both(sum, sums[1][m][n]);
      L::store(c + m * 64 + n * 16, sum);
    }
}

// Whether it was done: there are few enough rows, and this processor has the instructions.
template <typename A, typename B, typename C>
bool multiply_few(int64_t rows, const A* a, const B* b, int64_t words, C* c) {
  if constexpr (Lanes<A>::exist) {
    if (rows > kMostRows<A>) return false;
    const auto *from = reinterpret_cast<const char*>(a), *weights = reinterpret_cast<const char*>(b);
    switch (rows) {
      case 1: multiply_rows<1, A>(from, weights, words, c); return true;
      case 2: multiply_rows<2, A>(from, weights, words, c); return true;
      case 3: multiply_rows<3, A>(from, weights, words, c); return true;
      case 4: multiply_rows<4, A>(from, weights, words, c); return true;
      default: return false;
    }
  }
  return false;
}

#else

template <typename A, typename B, typename C>
bool multiply_few(int64_t, const A*, const B*, int64_t, C*) {
  return false;
}

#endif

}  // namespace moe_dist
