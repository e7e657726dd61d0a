// Attention of a decoder: rotated queries and keys, a cache, and what each token may see. Shapes: B
// texts, L new tokens of each, n tokens of each with those before, H heads, G of them for a key.
#pragma once

#include "routed_network.h"

#include <limits>

namespace moe_dist {

// y = x, rotated by its place, D long.
inline void rotate(const float* __restrict x, const float* __restrict cos, const float* __restrict sin,
                   int64_t D, float* __restrict y) {
  const int64_t half = D / 2;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    y[d] = x[d] * cos[d] - x[d + half] * sin[d];
    y[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half];
  }
}

inline void store_row(const float* from, int64_t D, float* to) { std::memcpy(to, from, D * sizeof(float)); }
inline void store_row(const float* from, int64_t D, at::BFloat16* to) { at::vec::convert(from, to, D); }

// What the tokens of a call may see: (B, n) of the caller's mask, or one for pairs of tokens. A
// token sees itself and those before it, in a layer with a window no more than so many.
class Sight {
 public:
  Sight(const MaybeTensor& mask, int64_t B, int64_t L, int64_t past) : B_(B), L_(L), past_(past) {
    if (!mask) return;
    if (mask->dim() == 4) {
      pairs_ = *mask;
      return;
    }
    TORCH_CHECK(mask->dim() == 2 && mask->size(0) == B && mask->size(1) == n(), "a mask of ",
                mask->sizes(), " for ", B, " texts of ", n(), " tokens");
    const Tensor own = mask->to(at::kBool).contiguous();
    const bool* values = own.const_data_ptr<bool>();
    for (int64_t i = 0; i < own.numel(); ++i)
      if (!values[i]) {
        seen_ = own;
        break;
      }
  }

  int64_t n() const { return past_ + L_; }
  bool is_of_pairs() const { return pairs_.defined(); }

  // The first token that new token l of any text may see.
  int64_t first(int64_t l, int64_t window) const {
    return window ? std::max<int64_t>(0, past_ + l + 1 - window) : 0;
  }

  // Of each token of a text, whether it is not padding; null where none is.
  const bool* seen(int64_t text) const {
    return seen_.defined() ? seen_.const_data_ptr<bool>() + text * n() : nullptr;
  }

  // None where attention that is causal by itself does the same.
  MaybeTensor for_pairs(int64_t window, at::ScalarType type) const {
    if (pairs_.defined()) return prepared_mask(pairs_, type);
    if (!past_ && !seen_.defined() && (!window || window >= L_)) return std::nullopt;
    const int64_t texts = seen_.defined() ? B_ : 1;
    Tensor out = at::zeros({texts, 1, L_, n()}, at::kBool);
    bool* to = out.data_ptr<bool>();
    for (int64_t b = 0; b < texts; ++b)
      for (int64_t l = 0; l < L_; ++l, to += n()) {
        const bool* own = seen(b);
        for (int64_t j = first(l, window); j <= past_ + l; ++j) to[j] = !own || own[j];
        to[past_ + l] = true;  // padding that sees nothing has no mean
      }
    return out;
  }

 private:
  int64_t B_, L_, past_;
  Tensor seen_, pairs_;
};

// One query of one head: keys and values (n, D), of which those from `first` to the
// query's own, `self`, are looked at. `scores` has room for n numbers.
template <typename T>
void attend_one(const float* query, const T* keys, const T* values, int64_t first, int64_t self,
                const bool* seen, int64_t D, float scale, float* scores, float* out) {
  const int64_t count = self + 1 - first;
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t j = 0; j < count; ++j) {
    const bool is_seen = !seen || seen[first + j] || first + j == self;
    scores[j] = is_seen ? scale * dot(query, keys + (first + j) * D, D) : -std::numeric_limits<float>::infinity();
    largest = std::max(largest, scores[j]);
  }
  float sum = 0;
  int64_t j = 0;
  Vec sums(0.f);
  for (; j + Vec::size() <= count; j += Vec::size()) {
    const Vec v = (Vec::loadu(scores + j) - Vec(largest)).exp_u20();
    v.store(scores + j);
    sums = sums + v;
  }
  if (j) sum = reduce_sum(sums);
  for (; j < count; ++j) sum += scores[j] = std::exp(scores[j] - largest);
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
  mix(scores, values + first * D, count, D, out);
}

}  // namespace moe_dist
