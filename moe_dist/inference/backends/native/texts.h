// Where the tokens of texts lie, row after row, when those that nobody sees are left out. Shapes: B
// texts, L tokens of each as they were given, H heads, T rows.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace moe_dist {

struct Texts {
  std::vector<int64_t> starts;  // (B + 1,): the rows of a text, which lie together
  int64_t longest = 0;
  at::Tensor kept;  // (T,) int64: the rows among the B * L that were given; undefined where all are kept

  int64_t count() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t length(int64_t b) const { return starts[b + 1] - starts[b]; }
  int64_t rows() const { return starts.back(); }
  bool all_alike() const { return rows() == longest * count(); }

  // Runs of texts of one length: where each begins, and where the last one ends.
  std::vector<int64_t> runs() const {
    std::vector<int64_t> out{0};
    for (int64_t b = 1; b < count(); ++b)
      if (length(b) != length(b - 1)) out.push_back(b);
    out.push_back(count());
    return out;
  }

  static Texts whole(int64_t B, int64_t L) {
    Texts texts;
    for (int64_t b = 0; b <= B; ++b) texts.starts.push_back(b * L);
    texts.longest = L;
    return texts;
  }

  // Texts without what nobody sees, where a mask (of bools, or of numbers that are added) says no more
  // than which tokens all others see, the first of each text among them, since a head may read what lies
  // there; else none.
  static std::optional<Texts> seen(const at::Tensor& mask, int64_t B, int64_t L) {
    const auto goes = [&](int64_t dim, int64_t size) { return mask.size(dim) == 1 || mask.size(dim) == size; };
    if (mask.dim() != 4 || mask.size(1) != 1 || mask.size(3) != L || !goes(0, B) || !goes(2, L)) return std::nullopt;
    if (mask.scalar_type() == at::kBool) return seen_in<bool>(mask, B, L);
    if (!mask.is_floating_point()) return std::nullopt;
    return seen_in<float>(mask.to(at::kFloat), B, L);
  }

 private:
  static bool hides(bool value) { return !value; }
  static bool hides(float value) { return value < -1e30f; }
  static bool shows(bool value) { return value; }
  static bool shows(float value) { return value == 0.f; }

  template <typename T>
  static std::optional<Texts> seen_in(const at::Tensor& given, int64_t B, int64_t L) {
    const at::Tensor mask = given.stride(3) == 1 ? given : given.contiguous();
    const T* values = mask.const_data_ptr<T>();
    const int64_t text_stride = mask.size(0) == 1 ? 0 : mask.stride(0);
    const int64_t query_stride = mask.size(2) == 1 ? 0 : mask.stride(2);
    Texts texts;
    texts.starts.push_back(0);
    std::vector<int64_t> kept;
    for (int64_t b = 0; b < B; ++b) {
      const T* keys = values + b * text_stride;
      if (!shows(keys[0])) return std::nullopt;
      for (int64_t q = 1; q < L && query_stride; ++q)
        if (std::memcmp(keys, keys + q * query_stride, L * sizeof(T))) return std::nullopt;
      for (int64_t l = 0; l < L; ++l) {
        if (shows(keys[l])) kept.push_back(b * L + l);
        else if (!hides(keys[l])) return std::nullopt;
      }
      const int64_t end = kept.size();
      texts.longest = std::max(texts.longest, end - texts.starts.back());
      texts.starts.push_back(end);
    }
    if (texts.rows() < B * L) texts.kept = at::tensor(kept, at::kLong);
    return texts;
  }
};

}  // namespace moe_dist
