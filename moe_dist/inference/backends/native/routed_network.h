// Feed-forward networks of which each token uses some: rows sorted by expert, products part by
// part. Shapes: T tokens, D model, E experts, K of them for a token, S = T * K slots.
#pragma once

#include "packed_gemm.h"
#include "team.h"

#include <memory>
#include <vector>

namespace moe_dist {

using MaybeTensor = std::optional<Tensor>;

// Codes of rows in a thread's own memory, with room for products that begin at any row.
class OwnCodes {
 public:
  OwnCodes(int64_t rows, int64_t widest, Precision precision)
      : precision_(precision), scale_(rows + 15), zero_(rows + 15) {
    const int64_t size = (rows + 15) * widest * bytes();
    codes_ = std::make_unique_for_overwrite<char[]>(size);
    // What is multiplied beyond the last row is not looked at, but some numbers take long.
    if (precision == Precision::kFloat) std::memset(codes_.get(), 0, size);
  }

  template <typename From>
  void put(int64_t row, const From* x, int64_t K) {
    encode_row(x, K, precision_, codes_.get() + row * K * bytes(), &scale_[row], &zero_[row]);
  }

  // Where codes lie that another product writes by itself, from row 0 on.
  void* data() { return codes_.get(); }

  RowCodes from(int64_t row, int64_t K) const {
    return {codes_.get() + row * K * bytes(), scale_.data() + row, zero_.data() + row};
  }

 private:
  int64_t bytes() const {
    return precision_ == Precision::kFloat ? 4 : precision_ == Precision::kBFloat16 ? 2 : 1;
  }

  Precision precision_;
  std::unique_ptr<char[]> codes_;
  std::vector<float> scale_, zero_;
};

struct FeedForward {
  Linear in, out;  // the first is gated, or not
};

// Where tokens lie when they are sorted by their experts.
struct Slots {
  std::vector<int64_t> starts;  // (E + 1,): where each expert's slots begin
  std::vector<int64_t> tokens;  // (S,) in the order of experts
  std::vector<int64_t> place;   // (S,) in the order of tokens: where its slot lies among them
};

inline Slots sort_slots(const Tensor& ids_TK, int64_t E) {
  const int64_t *expert_of = ids_TK.const_data_ptr<int64_t>(), S = ids_TK.numel(), K = ids_TK.size(1);
  Slots slots{std::vector<int64_t>(E + 1, 0), std::vector<int64_t>(S), std::vector<int64_t>(S)};
  for (int64_t s = 0; s < S; ++s) {
    TORCH_CHECK_INDEX(expert_of[s] >= 0 && expert_of[s] < E, "expert ", expert_of[s], " of ", E);
    ++slots.starts[expert_of[s] + 1];
  }
  for (int64_t e = 0; e < E; ++e) slots.starts[e + 1] += slots.starts[e];
  std::vector<int64_t> next(slots.starts.begin(), slots.starts.end() - 1);
  for (int64_t s = 0; s < S; ++s) {
    slots.place[s] = next[expert_of[s]]++;
    slots.tokens[slots.place[s]] = s / K;
  }
  return slots;
}

// Checks what a caller gave; ids (T, K) int64, weights of the same shape, or ones.
inline void check_routing(const Tensor& ids, const MaybeTensor& weights, int64_t T) {
  TORCH_CHECK(ids.dim() == 2 && ids.size(0) == T, "ids are ", ids.sizes(), " for ", T, " tokens");
  TORCH_CHECK(!weights || weights->sizes() == ids.sizes(), "weights and ids differ");
}

// Rows that a thread takes through products that follow each other, at most.
constexpr int64_t kPartRows = 2 * kBlockM;

// The networks of a layer.
struct Networks {
  std::vector<FeedForward> experts;
  std::vector<FeedForward> shared;  // one, or none
  int64_t activation = -1;
  Precision precision = Precision::kFloat;

  // What the networks add to each token, as float32. Token t's lies in row place[t], or in row t
  // where there are no places.
  struct Result {
    Tensor rows;
    std::vector<int64_t> place;

    const int64_t* places() const { return place.empty() ? nullptr : place.data(); }
  };

  // Without ids there is one network.
  Result operator()(const Tensor& x, const Tensor& ids, const MaybeTensor& weights) const {
    const int64_t T = x.size(0);
    if (!ids.defined()) {
      const Tensor out = rows_of(x, parts_of(T, nullptr), nullptr);
      if (!shared.empty()) out.add_(rows_of(x, whole(shared[0], T), nullptr));
      return {out, {}};
    }
    check_routing(ids, weights, T);
    Slots slots = sort_slots(ids, experts.size());
    const Tensor sorted = rows_of(x, parts_of(T, &slots), &slots.tokens);
    if (is_single(ids, weights)) return {sorted, std::move(slots.place)};
    const Tensor out = weighted_sum(sorted, slots.place, ids.size(1), weights, T);
    if (!shared.empty()) out.add_(rows_of(x, whole(shared[0], T), nullptr));
    return {out, {}};
  }

  // Whether each token has one network, whose result is all that is added to it.
  bool is_single(const Tensor& ids, const MaybeTensor& weights) const {
    return shared.empty() && !weights && (!ids.defined() || ids.size(1) == 1);
  }

  // Call `finish(token, row)` with what is added to each, while it is in the cache. Where `is_single`.
  template <typename Finish>
  void each_token(const Tensor& x, const Tensor& ids, Finish&& finish) const {
    if (!ids.defined()) return each_row(x, parts_of(x.size(0), nullptr), nullptr, finish);
    check_routing(ids, std::nullopt, x.size(0));
    const Slots slots = sort_slots(ids, experts.size());
    each_row(x, parts_of(x.size(0), &slots), &slots.tokens,
             [&](int64_t slot, const float* row) { finish(slots.tokens[slot], row); });
  }

 private:
  // Rows that one network multiplies, and where they lie in its input and output.
  struct Part {
    const FeedForward* network;
    int64_t first, count;
  };
  using Parts = std::vector<Part>;

  // Parts of a network are as large as memory near a core holds what lies between their products, as
  // long as there are some for every thread, and all about as large.
  static void add_parts(const FeedForward& network, int64_t first, int64_t last, int64_t S, Parts& parts) {
    const int64_t most = S >= 8 * kBlockM * at::get_num_threads() ? kPartRows : kBlockM;
    const int64_t count = last - first, number = (count + most - 1) / most;
    for (int64_t i = 0; i < number; ++i, first += parts.back().count) {
      const int64_t rest = last - first, even = (rest + number - i - 1) / (number - i);
      parts.push_back({&network, first, std::min(rest, (even + 15) / 16 * 16)});
    }
  }

  static Parts whole(const FeedForward& network, int64_t T) {
    Parts parts;
    add_parts(network, 0, T, T, parts);
    return parts;
  }

  Parts parts_of(int64_t T, const Slots* slots) const {
    if (!slots) {
      TORCH_CHECK(experts.size() == 1, "there are several experts, and no ids");
      return whole(experts[0], T);
    }
    Parts parts;
    for (size_t e = 0; e < experts.size(); ++e)
      add_parts(experts[e], slots->starts[e], slots->starts[e + 1], slots->tokens.size(), parts);
    return parts;
  }

  // The results as they lie in parts, float32.
  Tensor rows_of(const Tensor& x, const Parts& parts, const std::vector<int64_t>* tokens) const {
    const int64_t D = x.size(1);
    const Tensor out = matrix(tokens ? tokens->size() : x.size(0), D, at::kFloat);
    float* to = out.data_ptr<float>();
    each_row(x, parts, tokens, [&](int64_t slot, const float* row) { std::memcpy(to + slot * D, row, D * sizeof(float)); });
    return out;
  }

  // Call `finish(slot, row)` with each result. Slots are rows of x, or those that `tokens` names.
  template <typename Finish>
  void each_row(const Tensor& x, const Parts& parts, const std::vector<int64_t>* tokens, Finish&& finish) const {
    const float* from = x.const_data_ptr<float>();
    const int64_t D = x.size(1);
    const auto source = [&](int64_t slot) { return from + (tokens ? (*tokens)[slot] : slot) * D; };
    const int64_t number = parts.size();
    if (number >= at::get_num_threads())
      take_turns(number, [&](auto take) { apply_some(parts, D, take, source, finish); });
    else
      for (const Part& part : parts) apply_shared_out(part, D, source, finish);
  }

  // Part by part in one thread, so that what lies between the two products stays near its core.
  template <typename Take, typename Source, typename Finish>
  void apply_some(const Parts& parts, int64_t D, Take&& take, Source&& source, Finish&& finish) const {
    int64_t widest = D, most = 0;
    for (const Part& part : parts) {
      widest = std::max(widest, part.network->in.N);
      most = std::max(most, part.count);
    }
    const BlockProducts products(precision == Precision::kFloat);
    OwnCodes codes(most, widest, precision), inner_codes(most, widest, precision);
    // Of int8 a row's step is not known before all of it is.
    const bool writes_codes = precision != Precision::kInt8;
    const auto inner = std::make_unique_for_overwrite<at::BFloat16[]>(writes_codes ? 0 : most * widest);
    const auto results = std::make_unique_for_overwrite<float[]>(most * D);
    const int64_t number = parts.size();
    for (int64_t i = take(), next; i < number; i = next) {
      const Linear &in = parts[i].network->in, &out = parts[i].network->out;
      const int64_t first = parts[i].first, count = parts[i].count, F = in.N;
      for (int64_t r = 0; r < count; ++r) codes.put(r, source(first + r), D);
      if (precision == Precision::kFloat)
        in.apply_rows(codes.from(0, D), count, static_cast<float*>(inner_codes.data()), F, activation);
      else
        in.apply_rows(codes.from(0, D), count,
                      writes_codes ? static_cast<at::BFloat16*>(inner_codes.data()) : inner.get(), F, activation);
      for (int64_t r = 0; r < count && !writes_codes; ++r) inner_codes.put(r, inner.get() + r * F, F);
      out.apply_rows(inner_codes.from(0, F), count, results.get(), D);
      next = take();  // Not before, or one thread takes what another could begin.
      for (int64_t r = 0; r < count; ++r) {
        if (next < number && r < parts[next].count) prefetch_row(source(parts[next].first + r), D);
        finish(first + r, results.get() + r * D);
      }
    }
  }

  // By all threads, where there are fewer parts than these.
  template <typename Source, typename Finish>
  void apply_shared_out(const Part& part, int64_t D, Source&& source, Finish&& finish) const {
    const Linear &in = part.network->in, &out = part.network->out;
    const Tensor rows = matrix(part.count, D, at::kFloat), results = matrix(part.count, D, at::kFloat);
    for (int64_t r = 0; r < part.count; ++r)
      std::memcpy(rows.data_ptr<float>() + r * D, source(part.first + r), D * sizeof(float));
    float* to = results.data_ptr<float>();
    if (precision == Precision::kBFloat16) {
      const Tensor inner = matrix(part.count, in.N, at::kBFloat16);
      in.apply(encode(rows, precision), inner.data_ptr<at::BFloat16>(), in.N, activation);
      out.apply({inner, {}, {}}, to, D);
    } else {
      const Tensor inner = matrix(part.count, in.N, at::kFloat);
      in.apply(encode(rows, precision), inner.data_ptr<float>(), in.N, activation);
      out.apply(encode(inner, precision), to, D);
    }
    for (int64_t r = 0; r < part.count; ++r) finish(part.first + r, to + r * D);
  }

  // Each token's results, which lie where `place` says, times their weights: (T, D).
  static Tensor weighted_sum(const Tensor& sorted, const std::vector<int64_t>& place, int64_t K,
                             const MaybeTensor& weights, int64_t T) {
    const int64_t D = sorted.size(1);
    Tensor out = matrix(T, D, at::kFloat).zero_(), own_weights;
    if (weights) own_weights = weights->to(at::kFloat).contiguous();
    const float* weight = weights ? own_weights.const_data_ptr<float>() : nullptr;
    const float* from = sorted.const_data_ptr<float>();
    float* to = out.data_ptr<float>();
    at::parallel_for(0, T, 32, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t)
        for (int64_t s = t * K; s < (t + 1) * K; ++s) {
          const float w = weight ? weight[s] : 1.f;
          for (int64_t d = 0; d < D; ++d) to[t * D + d] += w * from[place[s] * D + d];
        }
    });
    return out;
  }
};

inline Tensor own_floats(const Tensor& values) {
  return values.detach().to(at::kFloat).clone(at::MemoryFormat::Contiguous);
}

// Hidden states of any shape as float32 rows, with room.
inline Tensor float_rows(const Tensor& hidden) {
  const Tensor flat = hidden.reshape({-1, hidden.size(-1)});
  Tensor rows = matrix(flat.size(0), flat.size(1), at::kFloat);
  rows.copy_(flat);
  return rows;
}

// A mask as attention takes it: of bools, or of numbers in its type that are added.
inline Tensor prepared_mask(const Tensor& mask, at::ScalarType type) {
  if (mask.scalar_type() == at::kBool) return mask;
  TORCH_CHECK(mask.is_floating_point(), "a mask is of bools, or of numbers that are added");
  // The lowest float32 is infinite in bfloat16, and a row of those has no mean.
  const double lowest = type == at::kFloat ? -3.4028234663852886e38 : -3.38e38;
  return mask.to(at::kFloat).clamp_min(lowest).to(type);
}

// What a context of attention gives the product after it, (T, width).
inline Rows context_rows(const Tensor& context, Precision precision) {
  if (precision != Precision::kBFloat16) return encode(float_rows(context), precision);
  Rows rows{matrix(context.size(0), context.size(1), at::kBFloat16), {}, {}};
  rows.codes.copy_(context);
  return rows;
}

inline at::ScalarType attention_type(Precision precision) {
  return precision == Precision::kFloat ? at::kFloat : at::kBFloat16;
}

}  // namespace moe_dist
