// Feed-forward networks of which each token uses some: rows sorted by expert, products part by
// part. Shapes: T tokens, D model, E experts, K of them for a token, S = T * K slots.
#pragma once

#include "packed_gemm.h"

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

  void put(int64_t row, const float* x, int64_t K) {
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

inline Slots sort_slots(const int64_t* expert_of, int64_t S, int64_t K, int64_t E) {
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
    const Rows rows = encode(x, precision);
    const int64_t T = x.size(0), D = x.size(1);
    const auto whole = [&](const FeedForward& network) {
      std::vector<Part> parts;
      add_parts(network, 0, T, parts);
      return apply(parts, rows, D);
    };
    if (!ids.defined()) {
      TORCH_CHECK(experts.size() == 1, "there are several experts, and no ids");
      const Tensor out = whole(experts[0]);
      if (!shared.empty()) out.add_(whole(shared[0]));
      return {out, {}};
    }
    check_routing(ids, weights, T);
    const int64_t K = ids.size(1), E = experts.size();
    Slots slots = sort_slots(ids.const_data_ptr<int64_t>(), T * K, K, E);
    // One for all, as of a text that is routed as a whole: nothing needs another place.
    if (K == 1 && !weights && shared.empty() && T > 0) {
      const int64_t first = *ids.const_data_ptr<int64_t>();
      if (slots.starts[first + 1] - slots.starts[first] == T) return {whole(experts[first]), {}};
    }
    std::vector<Part> parts;
    for (int64_t e = 0; e < E; ++e)
      add_parts(experts[e], slots.starts[e], slots.starts[e + 1], parts);
    const Tensor sorted = apply(parts, gather(rows, slots.tokens), D);
    if (K == 1 && !weights && shared.empty()) return {sorted, std::move(slots.place)};
    const Tensor out = weighted_sum(sorted, slots.place, K, weights, T);
    if (!shared.empty()) out.add_(whole(shared[0]));
    return {out, {}};
  }

 private:
  // Rows that one network multiplies, and where they lie in its input and output.
  struct Part {
    const FeedForward* network;
    int64_t first, count;
  };

  static void add_parts(const FeedForward& network, int64_t first, int64_t last, std::vector<Part>& parts) {
    for (; first < last; first += kBlockM)
      parts.push_back({&network, first, std::min(kBlockM, last - first)});
  }

  Tensor apply(const std::vector<Part>& parts, const Rows& rows, int64_t D) const {
    const int64_t number = parts.size();
    Tensor out = matrix(rows.codes.size(0), D, at::kFloat);
    float* to = out.data_ptr<float>();
    if (number < at::get_num_threads()) {
      for (const Part& part : parts) apply_shared_out(part, rows, to + part.first * D);
      return out;
    }
    at::parallel_for(0, number, 1, [&](int64_t first, int64_t last) { apply_some(parts, first, last, rows, to); });
    return out;
  }

  // Part by part in one thread, so that what lies between the two products stays near its core.
  void apply_some(const std::vector<Part>& parts, int64_t first, int64_t last, const Rows& rows, float* to) const {
    int64_t widest = 0;
    for (int64_t i = first; i < last; ++i) widest = std::max(widest, parts[i].network->in.N);
    OwnCodes codes(kBlockM, widest, precision);
    const bool writes_codes = precision == Precision::kBFloat16;  // the first product does so by itself
    const auto inner = std::make_unique_for_overwrite<float[]>(writes_codes ? 0 : kBlockM * widest);
    for (int64_t i = first; i < last; ++i) {
      const Linear &in = parts[i].network->in, &out = parts[i].network->out;
      const RowCodes own = row_codes(rows, parts[i].first);
      const int64_t count = parts[i].count, F = in.N;
      for (int64_t block = 0; block < in.blocks; ++block)
        if (writes_codes)
          in.apply_block(block, own, count, static_cast<at::BFloat16*>(codes.data()), F, activation);
        else
          in.apply_block(block, own, count, inner.get(), F, activation);
      for (int64_t r = 0; r < count && !writes_codes; ++r) codes.put(r, inner.get() + r * F, F);
      float* own_to = to + parts[i].first * out.N;
      for (int64_t block = 0; block < out.blocks; ++block)
        out.apply_block(block, codes.from(0, F), count, own_to, out.N);
    }
    at::native::cpublas::brgemm_release(precision != Precision::kFloat);
  }

  // By all threads, where there are fewer parts than these.
  void apply_shared_out(const Part& part, const Rows& rows, float* to) const {
    const Linear &in = part.network->in, &out = part.network->out;
    const Rows own = slice(rows, part.first, part.count);
    if (precision == Precision::kBFloat16) {
      const Tensor inner = matrix(part.count, in.N, at::kBFloat16);
      in.apply(own, inner.data_ptr<at::BFloat16>(), in.N, activation);
      out.apply({inner, {}, {}}, to, out.N);
    } else {
      const Tensor inner = matrix(part.count, in.N, at::kFloat);
      in.apply(own, inner.data_ptr<float>(), in.N, activation);
      out.apply(encode(inner, precision), to, out.N);
    }
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
  return mask.clamp_min(lowest).to(type);
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
