// Attention of short texts in bfloat16 with its backward pass: one head of one text at a time, in
// products of blocks whose sides stay in the cache. Shapes: B texts, H heads, L tokens, n of them with
// those that fill up, W width of a head.

#include "block_product.h"
#include "packed_sides.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace moe_dist {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// One side of attention as (B, H, L, W), whatever lies between rows.
struct Rows {
  BFloat16* start;
  int64_t by_text, by_head, by_row;

  explicit Rows(const Tensor& of)
      : start(const_cast<BFloat16*>(of.const_data_ptr<BFloat16>())),
        by_text(of.stride(0)),
        by_head(of.stride(1)),
        by_row(of.stride(2)) {}

  BFloat16* of(int64_t b, int64_t h) const { return start + b * by_text + h * by_head; }
};

// What is added to scores: numbers, or -infinity where a bool says that a key is not seen.
class Mask {
 public:
  explicit Mask(const std::optional<Tensor>& mask, int64_t B, int64_t H, int64_t L) {
    if (!mask) return;
    all_ = mask->expand({B, H, L, L});
    if (all_.stride(3) != 1) all_ = all_.contiguous();
    is_bool_ = all_.scalar_type() == at::kBool;
  }

  // Whether the row of query i differs from the one before.
  bool changes(int64_t i) const { return all_.defined() && (i == 0 || all_.stride(2)); }

  void read(int64_t b, int64_t h, int64_t i, int64_t L, float* to) const {
    const int64_t place = b * all_.stride(0) + h * all_.stride(1) + i * all_.stride(2);
    if (is_bool_) {
      const bool* row = all_.const_data_ptr<bool>() + place;
      for (int64_t j = 0; j < L; ++j) to[j] = row[j] ? 0.f : kNothing;
    } else {
      std::memcpy(to, all_.const_data_ptr<float>() + place, L * sizeof(float));
    }
  }

 private:
  Tensor all_;
  bool is_bool_ = false;
};

// Which weights are left out, drawn anew from the seed wherever they are asked for: nothing is kept of
// them between the passes.
class Dropout {
 public:
  Dropout(double rate, int64_t seed)
      : rate_(rate),
        lowest_(static_cast<uint32_t>(rate * 4294967296.)),
        factor_(static_cast<float>(1. / (1. - rate))),
        seed_(static_cast<uint64_t>(seed)) {}

  // Go to the weights of a query of a head.
  void go_to(int64_t head, int64_t i) {
    if (rate_ == 0.) return;
    row_ = mixed(mixed(static_cast<uint32_t>(seed_) + static_cast<uint32_t>(head) * 0x9E3779B1u) ^
                 static_cast<uint32_t>(seed_ >> 32)) +
           static_cast<uint32_t>(i) * 0x85EBCA77u;
    row_ = mixed(row_);
  }

  // 0, or what makes up for those that are 0, for the keys from j on.
  Vec factors(int64_t j) const {
    if (rate_ == 0.) return Vec(1.f);
#if defined(CPU_CAPABILITY_AVX512)
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(j)),
                                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __m512i drawn = _mm512_mullo_epi32(places, _mm512_set1_epi32(static_cast<int>(0xC2B2AE3Du)));
    drawn = _mm512_xor_si512(drawn, _mm512_set1_epi32(static_cast<int>(row_)));
    for (const uint32_t by : {0x85EBCA6Bu, 0xC2B2AE35u}) {
      drawn = _mm512_xor_si512(drawn, _mm512_srli_epi32(drawn, 15));
      drawn = _mm512_mullo_epi32(drawn, _mm512_set1_epi32(static_cast<int>(by)));
    }
    drawn = _mm512_xor_si512(drawn, _mm512_srli_epi32(drawn, 16));
    const __mmask16 kept = _mm512_cmpge_epu32_mask(drawn, _mm512_set1_epi32(static_cast<int>(lowest_)));
    return Vec(_mm512_maskz_mov_ps(kept, _mm512_set1_ps(factor_)));
#else
    return Vec(1.f);  // `takes` is false here
#endif
  }

 private:
  // The last steps of MurmurHash3 (A. Appleby, public domain), which let each bit depend on all.
  static uint32_t mixed(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
  }

  double rate_;
  uint32_t lowest_, row_ = 0;
  float factor_;
  uint64_t seed_;
};

// A thread's memory for one head after the other, of texts of one length.
class Head {
 public:
  Head(int64_t L, int64_t W, float scale, bool is_causal, const Dropout& dropout)
      : L_(L),
        n_(filled_length(L)),
        W_(W),
        columns_((W + kPartN - 1) / kPartN * kPartN),
        pairs_((W + 31) / 32 * 32),
        scale_(scale),
        is_causal_(is_causal),
        dropout_(dropout),
        seen_(n_, 0.f),
        scores_(n_ * n_) {
    std::fill(seen_.begin() + L, seen_.end(), kNothing);
  }

  // Takes the head of a number, which dropout is drawn for.
  void take(int64_t number) { number_ = number; }

  // Writes rows of `to`, and each query's logarithm of the sum of exponentials, infinite where it sees
  // nothing.
  void forward(const Rows& queries, const Rows& keys, const Rows& values, const Mask& mask, int64_t b, int64_t h,
               const Rows& to, float* logsumexp) {
    const BFloat16* own = copied(queries, b, h, queries_);
    turned(keys, b, h, turned_keys_);
    straight(values.of(b, h), values.by_row, straight_values_);
    multiply(own, W_, turned_keys_, n_, scores_, n_, W_);
    weights_.resize(n_ * n_);
    for (int64_t i = 0; i < L_; ++i) {
      see(mask, b, h, i);
      float* row = scores_.data() + i * n_;
      Vec most_of(kLowest);
      for (int64_t j = 0; j < n_; j += Vec::size()) most_of = at::vec::maximum(most_of, seen(row, j));
      const float most = reduce_max(most_of);
      Vec sums(0.f);
      for (int64_t j = 0; j < n_; j += 2 * Vec::size()) {
        const Vec one = exponential(seen(row, j) - Vec(most)), other = exponential(seen(row, j + Vec::size()) - Vec(most));
        sums = sums + (one + other);
        store_pair(one * dropout_.factors(j), other * dropout_.factors(j + Vec::size()), weights_.data() + i * n_ + j);
      }
      const float sum = reduce_sum(sums);
      const bool sees = most != kLowest;  // it may be no number
      factors_[i] = sees ? 1.f / sum : 0.f;
      logsumexp[i] = sees ? most + std::log(sum) : -kNothing;
    }
    results_.resize(n_ * columns_);
    multiply(weights_.data(), n_, straight_values_, columns_, results_, columns_, n_);
    write(to, b, h, factors_.data());
  }

  // Writes the gradients of queries, keys and values.
  void backward(const Rows& gradient, const Rows& queries, const Rows& keys, const Rows& values, const Mask& mask,
                const Rows& out, const float* logsumexp, int64_t b, int64_t h, const Rows& to_queries,
                const Rows& to_keys, const Rows& to_values) {
    const BFloat16 *own = copied(queries, b, h, queries_), *grad = copied(gradient, b, h, gradients_);
    turned(keys, b, h, turned_keys_);
    turned(values, b, h, turned_values_);
    multiply(own, W_, turned_keys_, n_, scores_, n_, W_);
    changes_.resize(n_ * n_);
    multiply(grad, W_, turned_values_, n_, changes_, n_, W_);
    weights_.resize(n_ * n_);
    for (int64_t i = 0; i < L_; ++i) {
      see(mask, b, h, i);
      float *row = scores_.data() + i * n_, *change = changes_.data() + i * n_;
      const Vec least(logsumexp[i]), mean(dot(grad + i * W_, out.of(b, h) + i * out.by_row, W_)), scale(scale_);
      for (int64_t j = 0; j < n_; j += 2 * Vec::size()) {
        const Vec one = exponential(seen(row, j) - least), other = exponential(seen(row, j + Vec::size()) - least);
        const Vec keeps = dropout_.factors(j), others = dropout_.factors(j + Vec::size());
        (one * keeps).store(row + j);
        (other * others).store(row + j + Vec::size());
        const Vec first = one * scale * (Vec::loadu(change + j) * keeps - mean);
        const Vec second = other * scale * (Vec::loadu(change + j + Vec::size()) * others - mean);
        first.store(change + j);
        second.store(change + j + Vec::size());
        store_pair(first, second, weights_.data() + i * n_ + j);
      }
    }
    results_.resize(n_ * columns_);
    straight(keys.of(b, h), keys.by_row, straight_values_);
    multiply(weights_.data(), n_, straight_values_, columns_, results_, columns_, n_);
    write(to_queries, b, h, nullptr);
    turn(changes_);
    straight(own, W_, straight_values_);
    multiply(weights_.data(), n_, straight_values_, columns_, results_, columns_, n_);
    write(to_keys, b, h, nullptr);
    turn(scores_);
    straight(grad, W_, straight_values_);
    multiply(weights_.data(), n_, straight_values_, columns_, results_, columns_, n_);
    write(to_values, b, h, nullptr);
  }

  static constexpr int64_t kLongest = 256;  // beyond, what lies between the products leaves the cache

 private:
  static constexpr float kLowest = std::numeric_limits<float>::lowest();
  static constexpr int64_t kRows = 64;

  // Rows of one head, with those of zeros that fill up: products read them in whole blocks.
  const BFloat16* copied(const Rows& rows, int64_t b, int64_t h, std::vector<BFloat16>& to) const {
    to.resize(n_ * W_);
    const BFloat16* from = rows.of(b, h);
    for (int64_t l = 0; l < L_; ++l) std::memcpy(to.data() + l * W_, from + l * rows.by_row, W_ * sizeof(BFloat16));
    return to.data();
  }

  void turned(const Rows& rows, int64_t b, int64_t h, std::vector<BFloat16>& to) const {
    to.resize(pairs_ * n_);
    pack_turned(rows.of(b, h), rows.by_row, L_, W_, to.data(), n_);
  }

  void straight(const BFloat16* rows, int64_t stride, std::vector<BFloat16>& to) const {
    to.resize(columns_ * n_);
    pack_rows(rows, stride, L_, W_, to.data(), columns_);
  }

  // results (L, N) = a (L, K) x b.
  void multiply(const BFloat16* a, int64_t lda, const std::vector<BFloat16>& b, int64_t N, std::vector<float>& results,
                int64_t ldc, int64_t K) const {
    for (int64_t first = 0; first < L_; first += kRows)
      multiply_block(std::min(kRows, L_ - first), N, K, lda, N * 4, ldc, a + first * lda, b.data(),
                     results.data() + first * ldc, [](int64_t, int64_t, int64_t) {});
  }

  // What query i sees of each key, and keeps of what it sees.
  void see(const Mask& mask, int64_t b, int64_t h, int64_t i) {
    dropout_.go_to(number_, i);
    if (mask.changes(i)) mask.read(b, h, i, L_, seen_.data());
    if (!is_causal_) return;
    if (i == 0) std::fill(seen_.begin(), seen_.end(), kNothing);
    seen_[i] = 0.f;
  }

  Vec seen(const float* scores, int64_t j) const {
    return at::vec::fmadd(Vec::loadu(scores + j), Vec(scale_), Vec::loadu(seen_.data() + j));
  }

  // The numbers of (L, n) in `weights_`, with keys and queries in each other's place.
  void turn(const std::vector<float>& from) {
    turned_.resize(n_ * n_);
#if defined(CPU_CAPABILITY_AVX512)
    at::vec::transpose_mxn<float>(from.data(), n_, turned_.data(), n_, L_, L_);
#endif
    for (int64_t l = 0; l < L_; ++l) to_bfloat16(turned_.data() + l * n_, n_, weights_.data() + l * n_);
  }

  void write(const Rows& to, int64_t b, int64_t h, const float* factors) const {
    for (int64_t l = 0; l < L_; ++l) {
      const float* row = results_.data() + l * columns_;
      BFloat16* own = to.of(b, h) + l * to.by_row;
      const float number = factors ? factors[l] : 1.f;
      const Vec factor(number);
      int64_t w = 0;
      for (; w + 2 * Vec::size() <= W_; w += 2 * Vec::size())
        store_pair(Vec::loadu(row + w) * factor, Vec::loadu(row + w + Vec::size()) * factor, own + w);
      for (; w < W_; ++w) own[w] = row[w] * number;
    }
  }

  int64_t L_, n_, W_, columns_, pairs_, number_ = 0;
  float scale_;
  bool is_causal_;
  Dropout dropout_;
  std::vector<BFloat16> queries_, gradients_, turned_keys_, turned_values_, straight_values_, weights_;
  std::vector<float> seen_, scores_, changes_, turned_, results_, factors_ = std::vector<float>(n_);
};

// What the kernels take: (B, H, L, W) bfloat16 on this processor, as many keys as queries.
bool takes(int64_t L, int64_t W) {
#if defined(CPU_CAPABILITY_AVX512)
  return L >= 1 && L <= Head::kLongest && W >= 2 && W % 2 == 0;
#else
  return false;
#endif
}

void check(const Tensor& one, const Tensor& like) {
  TORCH_CHECK(one.scalar_type() == at::kBFloat16 && one.dim() == 4 && one.sizes() == like.sizes() &&
                  one.stride(3) == 1 && one.stride(2) % 2 == 0,
              "attention is of ", one.scalar_type(), " ", one.sizes(), " ", one.strides(), " beside ", like.sizes());
}

// Calls `work(head, b, h)` for all of them, in all threads.
template <typename Work>
void each_head(const Tensor& like, double scale, bool is_causal, const Dropout& dropout, Work&& work) {
  const int64_t B = like.size(0), H = like.size(1);
  at::parallel_for(0, B * H, 1, [&](int64_t first, int64_t last) {
    const BlockProducts products(false);
    Head head(like.size(2), like.size(3), static_cast<float>(scale), is_causal, dropout);
    for (int64_t i = first; i < last; ++i) {
      head.take(i);
      work(head, i / H, i % H);
    }
  });
}

// As many numbers as `like`, the heads of a token beside each other in memory.
Tensor beside(const Tensor& like) {
  const int64_t H = like.size(1), L = like.size(2), W = like.size(3);
  return at::empty_strided(like.sizes(), {L * H * W, W, H * W, 1}, like.options());
}

// (B, H, L, W) and (B, H, L) float32, see `Head::forward`.
std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& mask, double scale, bool is_causal, double dropout,
                                  int64_t seed) {
  for (const Tensor& one : {query, key, value}) check(one, query);
  TORCH_CHECK(!mask || !is_causal, "a mask says what is seen, or that it is causal");
  TORCH_CHECK(dropout >= 0 && dropout < 1, "dropout is ", dropout);
  TORCH_CHECK(takes(query.size(2), query.size(3)), "no attention of ", query.sizes(), " here");
  Tensor out = beside(query), logsumexp = at::empty({query.size(0), query.size(1), query.size(2)}, at::kFloat);
  const Rows queries(query), keys(key), values(value), to(out);
  const Mask seen(mask, query.size(0), query.size(1), query.size(2));
  float* sums = logsumexp.data_ptr<float>();
  each_head(query, scale, is_causal, Dropout(dropout, seed), [&](Head& head, int64_t b, int64_t h) {
    head.forward(queries, keys, values, seen, b, h, to, sums + (b * query.size(1) + h) * query.size(2));
  });
  return {out, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor> attend_backward(const Tensor& gradient, const Tensor& query, const Tensor& key,
                                                   const Tensor& value, const std::optional<Tensor>& mask,
                                                   const Tensor& out, const Tensor& logsumexp, double scale,
                                                   bool is_causal, double dropout, int64_t seed) {
  for (const Tensor& one : {gradient, query, key, value, out}) check(one, query);
  TORCH_CHECK(takes(query.size(2), query.size(3)), "no attention of ", query.sizes(), " here");
  Tensor of_query = beside(query), of_key = beside(query), of_value = beside(query);
  const Rows grads(gradient), queries(query), keys(key), values(value), outs(out);
  const Rows to_queries(of_query), to_keys(of_key), to_values(of_value);
  const Mask seen(mask, query.size(0), query.size(1), query.size(2));
  const float* sums = logsumexp.const_data_ptr<float>();
  each_head(query, scale, is_causal, Dropout(dropout, seed), [&](Head& head, int64_t b, int64_t h) {
    head.backward(grads, queries, keys, values, seen, outs, sums + (b * query.size(1) + h) * query.size(2), b, h,
                  to_queries, to_keys, to_values);
  });
  return {of_query, of_key, of_value};
}

}  // namespace
}  // namespace moe_dist

TORCH_LIBRARY_FRAGMENT(moe_dist, library) {
  library.def("attends(int length, int width) -> bool", &moe_dist::takes);
  library.def(
      "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal, float dropout, int seed) "
      "-> (Tensor, Tensor)");
  library.def(
      "attend_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out, "
      "Tensor logsumexp, float scale, bool is_causal, float dropout, int seed) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(moe_dist, CPU, library) {
  library.impl("attend", moe_dist::attend);
  library.impl("attend_backward", moe_dist::attend_backward);
}
