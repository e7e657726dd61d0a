// Attention of short texts in bfloat16, where every token may see every other: one head of one text
// at a time, in two products of blocks. A thread has its `BlockProducts`. Shapes: L tokens, n of them
// with those that fill up, W width of a head.
#pragma once

#include "block_product.h"
#include "packed_sides.h"

#include <cstdint>
#include <limits>
#include <vector>

namespace moe_dist {

class TextAttention {
 public:
  static constexpr int64_t kLongest = 512;  // beyond, scores of all keys leave the cache

  // Whether texts of this length are its own; bfloat16 has blocks where `has_blocks`.
  static bool takes(int64_t L, int64_t width, bool has_blocks) {
#if defined(CPU_CAPABILITY_AVX512)
    return has_blocks && L >= 1 && L <= kLongest && width % 2 == 0;
#else
    return false;
#endif
  }

  TextAttention(int64_t longest, int64_t width)
      : width_(width),
        columns_((width + kPartN - 1) / kPartN * kPartN),
        scale_(1.f / std::sqrt(static_cast<float>(width))),
        keys_((width + 31) / 32 * 32 * filled_length(longest)),
        values_(columns_ * filled_length(longest)),
        weights_(kRows * filled_length(longest)),
        scores_(kRows * filled_length(longest)),
        sums_(kRows * columns_),
        seen_(filled_length(longest)),
        factors_(kRows) {}

  // Texts have so many tokens from here on, at most the longest. What fills them up is no number of
  // another text, which may be none.
  void set_length(int64_t L) {
    if (L == L_) return;
    L_ = L;
    n_ = filled_length(L);
    std::fill(keys_.begin(), keys_.end(), at::BFloat16(0.f));
    std::fill(values_.begin(), values_.end(), at::BFloat16(0.f));
    std::fill(seen_.begin(), seen_.begin() + L, 0.f);
    std::fill(seen_.begin() + L, seen_.begin() + n_, -std::numeric_limits<float>::infinity());
  }

  // Queries, keys and values are L rows each, `stride` apart, with room for 15 more queries. `mask` is
  // added to scores: one number for each key, in a row for each query (`mask_stride` apart), or null.
  // Writes L rows that lie `to_stride` apart.
  void operator()(const at::BFloat16* queries, const at::BFloat16* keys, const at::BFloat16* values, int64_t stride,
                  const float* mask, int64_t mask_stride, at::BFloat16* to, int64_t to_stride) {
    pack_turned(keys, stride, L_, width_, keys_.data(), n_);
    pack_rows(values, stride, L_, width_, values_.data(), columns_);
    for (int64_t first = 0; first < L_; first += kRows) {
      const int64_t count = std::min(kRows, L_ - first);
      const auto nothing = [](int64_t, int64_t, int64_t) {};
      multiply_block(count, n_, width_, stride, n_ * 4, n_, queries + first * stride, keys_.data(), scores_.data(), nothing);
      for (int64_t r = 0; r < count; ++r) {
        if (mask && (r + first == 0 || mask_stride))
          std::memcpy(seen_.data(), mask + (first + r) * mask_stride, L_ * sizeof(float));
        factors_[r] = weigh(scores_.data() + r * n_, weights_.data() + r * n_);
      }
      multiply_block(count, columns_, n_, n_, columns_ * 4, columns_, weights_.data(), values_.data(), sums_.data(), nothing);
      for (int64_t r = 0; r < count; ++r) finish(r, to + (first + r) * to_stride);
    }
  }

 private:
  static constexpr int64_t kRows = 64;

  // What a query's scores make of each value, but for the factor that it gives.
  float weigh(const float* scores, at::BFloat16* weights) const {
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    const auto seen = [&](int64_t j) {
      return at::vec::fmadd(Vec::loadu(scores + j), Vec(scale_), Vec::loadu(seen_.data() + j));
    };
    Vec largest(kLowest), other_largest(kLowest), sum(0.f);
    for (int64_t j = 0; j < n_; j += 2 * Vec::size()) {
      largest = at::vec::clamp_min(seen(j), largest);
      other_largest = at::vec::clamp_min(seen(j + Vec::size()), other_largest);
    }
    const float most = reduce_max(at::vec::maximum(largest, other_largest));
    for (int64_t j = 0; j < n_; j += 2 * Vec::size()) {
      const Vec first = exponential(seen(j) - Vec(most)), second = exponential(seen(j + Vec::size()) - Vec(most));
      sum = sum + (first + second);
      store_pair(first, second, weights + j);
    }
    return most == kLowest ? 0.f : 1.f / reduce_sum(sum);  // a token that sees nothing gets nothing
  }

  void finish(int64_t r, at::BFloat16* to) const {
    const float* sums = sums_.data() + r * columns_;
    const Vec factor(factors_[r]);
    int64_t w = 0;
    for (; w + 2 * Vec::size() <= width_; w += 2 * Vec::size())
      store_pair(Vec::loadu(sums + w) * factor, Vec::loadu(sums + w + Vec::size()) * factor, to + w);
    for (; w < width_; ++w) to[w] = sums[w] * factors_[r];
  }

  int64_t L_ = 0, n_ = 0, width_, columns_;
  float scale_;
  std::vector<at::BFloat16> keys_, values_, weights_;
  std::vector<float> scores_, sums_, seen_, factors_;
};

}  // namespace moe_dist
