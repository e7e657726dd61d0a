// The right side of a product of blocks in bfloat16: two numbers that are multiplied with one row's
// neighbours lie together. Shapes: L rows of W numbers, W even.
#pragma once

#include "vectors.h"

#include <cstdint>

namespace moe_dist {

#if defined(CPU_CAPABILITY_AVX512)
// Numbers of two vectors by turns: those of their first halves, and of their second.
inline __m512i first_half() {
  const __m512i pairs = _mm512_cvtepi16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  return _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_add_epi32(pairs, _mm512_set1_epi32(32)), 16));
}
inline __m512i second_half() { return _mm512_add_epi16(first_half(), _mm512_set1_epi16(16)); }
#endif

// Columns of a product with L rows turned, which are filled up to whole blocks.
inline int64_t filled_length(int64_t L) { return L > 64 ? (L + 63) / 64 * 64 : (L + 31) / 32 * 32; }

// For a product with the rows turned into columns: pairs of a row's numbers, `to_columns` of them a line.
inline void pack_turned(const at::BFloat16* rows, int64_t stride, int64_t L, int64_t W, at::BFloat16* to,
                        int64_t to_columns) {
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(rows), stride / 2, reinterpret_cast<float*>(to),
                                to_columns, L, W / 2);
#endif
}

// For a product with the rows as they are: pairs of rows, each `to_columns` numbers wide. With an odd
// number of rows the last one stands beside itself, where it is to be multiplied with 0.
inline void pack_rows(const at::BFloat16* rows, int64_t stride, int64_t L, int64_t W, at::BFloat16* to,
                      int64_t to_columns) {
  for (int64_t l = 0; l < L; l += 2) {
    const at::BFloat16 *one = rows + l * stride, *other = l + 1 < L ? one + stride : one;
    at::BFloat16* pairs = to + l * to_columns;
    int64_t w = 0;
#if defined(CPU_CAPABILITY_AVX512)
    for (; w + 32 <= W; w += 32) {
      const __m512i a = _mm512_loadu_si512(one + w), b = _mm512_loadu_si512(other + w);
      _mm512_storeu_si512(pairs + 2 * w, _mm512_permutex2var_epi16(a, first_half(), b));
      _mm512_storeu_si512(pairs + 2 * w + 32, _mm512_permutex2var_epi16(a, second_half(), b));
    }
#endif
    for (; w < W; ++w) {
      pairs[2 * w] = one[w];
      pairs[2 * w + 1] = other[w];
    }
  }
}

}  // namespace moe_dist
