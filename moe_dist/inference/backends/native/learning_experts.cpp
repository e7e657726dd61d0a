// Feed-forward networks with stacked weights over rows grouped by expert, with their backward pass, in
// products of blocks. Shapes: S rows, D width, F neurons, E experts; M rows of a chunk with those that
// fill up, n of them real.

#include "block_product.h"
#include "packed_sides.h"
#include "slopes.h"
#include "team.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

namespace moe_dist {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kColumns = 64;    // of a product that are done together
constexpr int64_t kChunk = 160;     // rows that a thread takes at a time, at most
constexpr int64_t kGroup = 1024;    // about as many rows share what gradients of weights are made of
constexpr int64_t kIn = 0, kGate = 1, kOut = 2;

int64_t rounded(int64_t number, int64_t by) { return (number + by - 1) / by * by; }
int64_t parts(int64_t number, int64_t of) { return (number + of - 1) / of; }

// Rows of one expert that all threads work on together, in chunks.
struct Group {
  int64_t expert, first, rows, chunk, turn;  // `turn` numbers experts
  bool starts;                               // its expert

  int64_t chunks() const { return parts(rows, chunk); }
  int64_t begin(int64_t c) const { return first + c * chunk; }
  int64_t real(int64_t c) const { return std::min(chunk, rows - c * chunk); }
};

std::vector<Group> plan(at::IntArrayRef sizes, int64_t most) {
  std::vector<Group> groups;
  const int64_t threads = at::get_num_threads();
  int64_t first = 0, turn = 0;
  for (size_t e = 0; e < sizes.size(); ++e) {
    if (!sizes[e]) continue;
    const int64_t own = rounded(parts(sizes[e], std::max<int64_t>(1, (sizes[e] + most / 2) / most)), 16);
    for (int64_t at = 0; at < sizes[e]; at += own) {
      const int64_t rows = std::min(own, sizes[e] - at), chunks = rounded(parts(rows, kChunk), threads);
      groups.push_back({(int64_t)e, first + at, rows, rounded(parts(rows, chunks), 16), turn, at == 0});
    }
    first += sizes[e];
    ++turn;
  }
  return groups;
}

// Memory of one thread or of all, cut into pieces that begin on a cache line.
template <typename T>
class Room {
 public:
  Room(int64_t pieces, int64_t numbers)
      : size_(rounded(numbers, 64)), all_(at::empty({pieces * size_}, at::CppTypeToScalarType<T>::value)) {}
  T* operator[](int64_t piece) const { return all_.template mutable_data_ptr<T>() + piece * size_; }

 private:
  int64_t size_;
  Tensor all_;
};

// The right side (K, N) of a product, as a whole or from column j on.
template <typename T>
const T* columns(const T* b, int64_t j) {
  return b + (std::is_same_v<T, float> ? j : 2 * j);
}

// c (M, N), whose rows are `kColumns` apart, = or += a (M, K) x b (K, N).
template <typename T>
void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, float* c,
              bool adds = false) {
  at::native::cpublas::brgemm(M, N, K, lda, ldb, kColumns, adds, a, b, c, !std::is_same_v<T, float>);
}

// to (W, L) = from (L, W) turned, with zeros for columns L to M.
void turn(const float* from, int64_t L, int64_t W, int64_t M, float* to, int64_t ld) {
#if defined(CPU_CAPABILITY_AVX512)
  at::vec::transpose_mxn<float>(from, W, to, ld, L, W);
#endif
  for (int64_t w = 0; M > L && w < W; ++w) std::memset(to + w * ld + L, 0, (M - L) * sizeof(float));
}

void turn(const BFloat16* from, int64_t L, int64_t W, int64_t M, BFloat16* to, int64_t ld) {
#if defined(CPU_CAPABILITY_AVX512)
  for (int64_t l = 0; l < L; l += 32)
    for (int64_t w = 0; w < W; w += 32)
      at::vec::transpose_mxn<BFloat16>(from + l * W + w, W, to + w * ld + l, ld, std::min<int64_t>(32, L - l), 32);
#endif
  for (int64_t w = 0; M > L && w < W; ++w) std::memset(to + w * ld + L, 0, (M - L) * sizeof(BFloat16));
}

// Rows (L, W) as the first of the right side of a product, with those of zeros up to M.
void put(const float* from, int64_t L, int64_t W, int64_t M, float* to) {
  std::memcpy(to, from, L * W * sizeof(float));
  std::memset(to + L * W, 0, (M - L) * W * sizeof(float));
}

void put(const BFloat16* from, int64_t L, int64_t W, int64_t M, BFloat16* to) {
  pack_rows(from, W, L, W, to, W);
  const int64_t done = rounded(L, 2);
  std::memset(to + done * W, 0, (M - done) * W * sizeof(BFloat16));
}

void convert(const float* from, int64_t count, BFloat16* to) { to_bfloat16(from, count, to); }

// Rows of weights in the precision of products.
template <typename T, typename W>
const T* in_precision(const W* rows, int64_t count, T* room) {
  if constexpr (std::is_same_v<T, W>) {
    return rows;
  } else {
    convert(rows, count, room);
    return room;
  }
}

struct Sizes {
  int64_t S, D, F;
  bool gated;

  int64_t outputs(int64_t side) const { return side == kOut ? D : F; }
  int64_t inputs(int64_t side) const { return side == kOut ? F : D; }
};

// Weights (E, outputs, inputs) of the three layers.
template <typename W>
struct Weights {
  std::array<const W*, 3> start{};

  const W* of(int64_t side, int64_t expert, const Sizes& sizes) const {
    return start[side] + expert * sizes.D * sizes.F;
  }
};

// What a thread needs for one chunk.
template <typename T>
struct Scratch {
  T *rows, *inner, *in, *gate, *converted;
  float *sums, *others;
};

template <typename T>
class Scratches {
 public:
  explicit Scratches(const Sizes& s)
      : rows_(threads(), kChunk * s.D),
        neurons_(3 * threads(), kChunk * s.F),
        converted_(threads(), kColumns * std::max(s.D, s.F)),
        sums_(2 * threads(), kChunk * kColumns) {}

  Scratch<T> of(const Member& member) const {
    const int64_t i = member.number;
    return {rows_[i],      neurons_[3 * i], neurons_[3 * i + 1], neurons_[3 * i + 2],
            converted_[i], sums_[2 * i],    sums_[2 * i + 1]};
  }

 private:
  static int64_t threads() { return at::get_num_threads(); }

  Room<T> rows_, neurons_, converted_;
  Room<float> sums_;
};

// M rows of which n are real. What else is in a tensor may be read, but nothing beyond its end.
template <typename T>
const T* take(const T* all, int64_t S, int64_t width, int64_t first, int64_t n, int64_t M, T* room) {
  if (first + M <= S) return all + first * width;
  std::memcpy(room, all + first * width, n * width * sizeof(T));
  return room;
}

// Calls back with the first column and the number of columns of each block.
template <typename Function>
void each_block(int64_t width, Function&& function) {
  for (int64_t j = 0; j < width; j += kColumns) function(j, std::min(kColumns, width - j));
}

// Calls back with row and column of each pair of vectors.
template <typename Function>
void each_pair(int64_t n, int64_t N, Function&& function) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < N; j += 2 * Vec::size()) function(i, j);
}

template <typename T, typename W>
void forward(const Sizes& s, const std::vector<Group>& groups, const T* rows, const Weights<W>& weights,
             const std::array<const T*, 3>& biases, int64_t activation, T* out, T* kept_in, T* kept_gate) {
  const Scratches<T> scratches(s);
  const Room<T> packed(2 * 3, s.D * s.F);
  const auto bias = [&](int64_t side, int64_t expert, int64_t column) {
    return biases[side] ? load_float(biases[side] + expert * s.outputs(side) + column) : Vec(0.f);
  };
  with_slopes(activation, [&](auto activate) {
    const auto chunk = [&](const Group& g, int64_t c, const Scratch<T>& own) {
      const int64_t first = g.begin(c), n = g.real(c), M = rounded(n, 16), half = 3 * (g.turn % 2);
      const T* x = take(rows, s.S, s.D, first, n, M, own.rows);
      each_block(s.F, [&](int64_t at, int64_t N) {
        multiply(M, N, s.D, x, s.D, columns<T>(packed[half + kIn], at), s.F, own.sums);
        if (s.gated) multiply(M, N, s.D, x, s.D, columns<T>(packed[half + kGate], at), s.F, own.others);
        each_pair(n, N, [&](int64_t i, int64_t j) {
          Vec found[2];
          const int64_t to = (first + i) * s.F + at + j;
          Vec in[2], gate[2];
          for (int64_t v = 0; v < 2; ++v) {
            const int64_t k = j + v * Vec::size();
            in[v] = Vec::loadu(own.sums + i * kColumns + k) + bias(kIn, g.expert, at + k);
            if (s.gated) gate[v] = Vec::loadu(own.others + i * kColumns + k) + bias(kGate, g.expert, at + k);
            found[v] = s.gated ? activate(gate[v]) * in[v] : activate(in[v]);
          }
          if (kept_in) store_pair(in[0], in[1], kept_in + to);
          if (kept_gate) store_pair(gate[0], gate[1], kept_gate + to);
          store_pair(found[0], found[1], own.inner + i * s.F + at + j);
        });
      });
      each_block(s.D, [&](int64_t at, int64_t N) {
        multiply(M, N, s.F, own.inner, s.F, columns<T>(packed[half + kOut], at), s.D, own.sums);
        each_pair(n, N, [&](int64_t i, int64_t j) {
          const float* sums = own.sums + i * kColumns + j;
          store_pair(Vec::loadu(sums) + bias(kOut, g.expert, at + j),
                     Vec::loadu(sums + Vec::size()) + bias(kOut, g.expert, at + j + Vec::size()),
                     out + (first + i) * s.D + at + j);
        });
      });
    };
    // Turned weights: columns of the right side are outputs.
    const auto pack = [&](const Group& g, int64_t unit, const Scratch<T>& own) {
      const int64_t of_in = parts(s.F, kColumns), in_all = s.gated ? 2 * of_in : of_in;
      const int64_t side = unit >= in_all ? kOut : unit / of_in;
      const int64_t at = (unit >= in_all ? unit - in_all : unit % of_in) * kColumns;
      const int64_t outputs = s.outputs(side), inputs = s.inputs(side), L = std::min(kColumns, outputs - at);
      const T* from = in_precision<T>(weights.of(side, g.expert, s) + at * inputs, L * inputs, own.converted);
      T* to = packed[3 * (g.turn % 2) + side];
      if constexpr (std::is_same_v<T, float>)
        turn(from, L, inputs, L, to + at, outputs);
      else
        pack_turned(from, inputs, L, inputs, to + 2 * at, outputs);
    };
    const int64_t units = parts(s.F, kColumns) * (s.gated ? 2 : 1) + parts(s.D, kColumns);
    in_team([&](const Member& member) {
      const BlockProducts products(std::is_same_v<T, float>);
      const Scratch<T> own = scratches.of(member);
      for (const Group& g : groups) {
        if (g.starts) member.share(units, [&](int64_t unit) { pack(g, unit, own); });
        // Weights lie in turn in two places: who is here has done with the expert before the last.
        member.meet();
        member.share(g.chunks(), [&](int64_t c) { chunk(g, c, own); });
      }
    });
  });
}

// Gradients of weights and biases, where they are wanted; experts whose weights have one already.
template <typename T, typename W>
struct Sums {
  std::array<W*, 3> weights{};
  std::array<float*, 3> biases{};  // sums of many groups
  std::array<std::vector<bool>, 3> begun;

  bool any() const {
    bool found = false;
    for (int64_t side = 0; side < 3; ++side) found = found || weights[side] || biases[side];
    return found;
  }
};

// What gradients of weights are made of: for each layer the gradients of its outputs, turned, chunk
// after chunk, and its inputs as right sides.
template <typename T>
class Factors {
 public:
  Factors(const Sizes& s, const std::vector<Group>& groups) : s_(s) {
    for (const Group& g : groups) {
      turned_ = std::max(turned_, g.chunks() * g.chunk);
      rows_ = std::max(rows_, rounded(g.rows, 16));
    }
    outputs_.emplace(2 * 3, turned_ * std::max(s.D, s.F));
    inputs_.emplace(2 * 2, rows_ * std::max(s.D, s.F));
  }

  T* outputs(int64_t half, int64_t side, const Group& g, int64_t c) const {
    return (*outputs_)[3 * half + side] + c * g.chunk * s_.outputs(side);
  }
  T* inputs(int64_t half, int64_t side, int64_t row) const {
    return (*inputs_)[2 * half + (side == kOut)] + row * s_.inputs(side);
  }

 private:
  Sizes s_;
  int64_t turned_ = 0, rows_ = 0;
  std::optional<Room<T>> outputs_, inputs_;
};

void add_pair(const Vec& one, const Vec& other, bool adds, float* to) {
  if (adds)
    store_pair(one + Vec::loadu(to), other + Vec::loadu(to + Vec::size()), to);
  else
    store_pair(one, other, to);
}
void add_pair(const Vec& one, const Vec& other, bool adds, BFloat16* to) {
  if (adds)
    store_pair(one + load_float(to), other + load_float(to + Vec::size()), to);
  else
    store_pair(one, other, to);
}

template <typename T, typename W>
void backward(const Sizes& s, const std::vector<Group>& groups, const T* grad, const T* rows, const T* kept_in,
              const T* kept_gate, const Weights<W>& weights, int64_t activation, T* grad_rows,
              const Sums<T, W>& sums) {
  constexpr bool kPacks = !std::is_same_v<T, float>;
  const Scratches<T> scratches(s);
  const Room<T> packed(kPacks ? 2 * 3 : 0, s.D * s.F);
  const Factors<T> factors(s, groups);
  const bool learns = sums.any();
  const auto right = [&](const Group& g, int64_t side) -> const T* {
    if constexpr (kPacks)
      return packed[3 * (g.turn % 2) + side];
    else
      return weights.of(side, g.expert, s);
  };
  const auto pack = [&](const Group& g, int64_t unit, const Scratch<T>& own) {
    constexpr int64_t kLines = 32;
    const int64_t of_in = s.F / kLines, in_all = s.gated ? 2 * of_in : of_in;
    const int64_t side = unit >= in_all ? kOut : unit / of_in, width = s.inputs(side);
    const int64_t at = (unit >= in_all ? unit - in_all : unit % of_in) * kLines;
    const T* from = in_precision<T>(weights.of(side, g.expert, s) + at * width, kLines * width, own.converted);
    put(from, kLines, width, kLines, packed[3 * (g.turn % 2) + side] + at * width);
  };
  with_slopes(activation, [&](auto activate) {
    const auto chunk = [&](const Group& g, int64_t half, int64_t c, const Scratch<T>& own) {
      const int64_t first = g.begin(c), n = g.real(c), M = rounded(n, 16);
      const T* slope = take(grad, s.S, s.D, first, n, M, own.rows);
      each_block(s.F, [&](int64_t at, int64_t N) {
        multiply(M, N, s.D, slope, s.D, columns<T>(right(g, kOut), at), s.F, own.sums);
        each_pair(n, N, [&](int64_t i, int64_t j) {
          const int64_t from = (first + i) * s.F + at + j, to = i * s.F + at + j;
          Vec inner[2], in[2], gate[2];
          for (int64_t v = 0; v < 2; ++v) {
            const int64_t k = v * Vec::size();
            const Vec given = Vec::loadu(own.sums + i * kColumns + j + k), x = load_float(kept_in + from + k);
            if (s.gated) {
              const Slope one = with_slope(activate, load_float(kept_gate + from + k));
              inner[v] = one.value * x;
              in[v] = given * one.value;
              gate[v] = given * x * one.slope;
            } else {
              const Slope one = with_slope(activate, x);
              inner[v] = one.value;
              in[v] = given * one.slope;
            }
          }
          store_pair(inner[0], inner[1], own.inner + to);
          store_pair(in[0], in[1], own.in + to);
          if (s.gated) store_pair(gate[0], gate[1], own.gate + to);
        });
      });
      if (learns) {
        const int64_t row = c * g.chunk;
        turn(slope, n, s.D, M, factors.outputs(half, kOut, g, c), g.chunk);
        turn(own.in, n, s.F, M, factors.outputs(half, kIn, g, c), g.chunk);
        if (s.gated) turn(own.gate, n, s.F, M, factors.outputs(half, kGate, g, c), g.chunk);
        put(own.inner, n, s.F, M, factors.inputs(half, kOut, row));
        put(rows + first * s.D, n, s.D, M, factors.inputs(half, kIn, row));
      }
      if (!grad_rows) return;
      each_block(s.D, [&](int64_t at, int64_t N) {
        multiply(M, N, s.F, own.in, s.F, columns<T>(right(g, kIn), at), s.D, own.sums);
        if (s.gated) multiply(M, N, s.F, own.gate, s.F, columns<T>(right(g, kGate), at), s.D, own.sums, true);
        each_pair(n, N, [&](int64_t i, int64_t j) {
          const float* found = own.sums + i * kColumns + j;
          store_pair(Vec::loadu(found), Vec::loadu(found + Vec::size()), grad_rows + (first + i) * s.D + at + j);
        });
      });
    };
    // The gradients of the outputs from one on, at most `kColumns` of them.
    const auto learn = [&](const Group& g, int64_t half, int64_t side, int64_t output, const Scratch<T>& own) {
      const int64_t outputs = s.outputs(side), inputs = s.inputs(side), L = std::min(kColumns, outputs - output);
      if (sums.weights[side]) {
        W* to = sums.weights[side] + (g.expert * outputs + output) * inputs;
        const bool adds = !g.starts || sums.begun[side][g.expert];
        each_block(inputs, [&](int64_t at, int64_t N) {
          for (int64_t c = 0; c < g.chunks(); ++c)
            multiply<T>(L, N, rounded(g.real(c), 16), factors.outputs(half, side, g, c) + output * g.chunk, g.chunk,
                        columns<T>(factors.inputs(half, side, c * g.chunk), at), inputs, own.sums, c > 0);
          each_pair(L, N, [&](int64_t i, int64_t j) {
            const float* found = own.sums + i * kColumns + j;
            add_pair(Vec::loadu(found), Vec::loadu(found + Vec::size()), adds, to + i * inputs + at + j);
          });
        });
      }
      for (int64_t i = 0; sums.biases[side] && i < L; ++i) {
        float sum = 0;
        for (int64_t c = 0; c < g.chunks(); ++c) {
          const T* own_row = factors.outputs(half, side, g, c) + (output + i) * g.chunk;
          Vec total(0.f);
          for (int64_t k = 0; k < rounded(g.real(c), 16); k += Vec::size()) total = total + load_float(own_row + k);
          sum += reduce_sum(total);
        }
        sums.biases[side][g.expert * outputs + output + i] += sum;
      }
    };
    in_team([&](const Member& member) {
      const BlockProducts products(!kPacks);
      const Scratch<T> own = scratches.of(member);
      int64_t half = 0;
      for (const Group& g : groups) {
        // What is written lies in turn in two places: who is past a meeting has done with the group
        // before.
        if (kPacks && g.starts) {
          member.share((s.F * (s.gated ? 2 : 1) + s.D) / 32, [&](int64_t unit) { pack(g, unit, own); });
          member.meet();
        }
        member.share(g.chunks(), [&](int64_t c) { chunk(g, half, c, own); });
        member.meet();
        for (int64_t side = 0; side < 3; ++side)
          if (sums.weights[side] || sums.biases[side])
            member.share(parts(s.outputs(side), kColumns),
                         [&](int64_t block) { learn(g, half, side, block * kColumns, own); });
        half = 1 - half;
      }
    });
  });
}

void check_stack(const Tensor& one, at::IntArrayRef shape, at::ScalarType type) {
  TORCH_CHECK(one.sizes() == shape && one.scalar_type() == type && one.is_contiguous(), "experts have ",
              one.scalar_type(), " ", one.sizes(), " in place of ", type, " ", shape);
}

// What a call is given, looked at.
struct Call {
  Sizes s;
  int64_t E;
  at::ScalarType type, stored;

  Call(const Tensor& rows, at::IntArrayRef sizes, at::TensorList weights, int64_t activation) {
    TORCH_CHECK(activation >= 0 && activation <= 4, "there is no activation ", activation);
    TORCH_CHECK(weights.size() == 3 && weights[kIn].dim() == 3 && rows.dim() == 2, "experts have three weights");
    E = weights[kIn].size(0);
    s = {rows.size(0), weights[kIn].size(2), weights[kIn].size(1), weights[kGate].numel() > 0};
    type = rows.scalar_type();
    stored = weights[kIn].scalar_type();
    for (const int64_t size : sizes) TORCH_CHECK(size >= 0, "an expert has ", size, " rows");
    TORCH_CHECK((int64_t)sizes.size() == E && at::sum_integers(sizes) == s.S, "sizes are ", sizes, " of ", s.S);
    TORCH_CHECK(s.D % 32 == 0 && s.F % 32 == 0 && s.D && s.F, "experts of ", weights[kIn].sizes());
    check_stack(rows, {s.S, s.D}, type);
    for (int64_t side = 0; side < 3; ++side)
      if (side != kGate || s.gated) check_stack(weights[side], {E, s.outputs(side), s.inputs(side)}, stored);
  }

  template <typename Function>
  void with_types(Function&& function) const {
    if (type == at::kFloat && stored == at::kFloat) return function(float(), float());
    TORCH_CHECK(type == at::kBFloat16, "no experts of ", type, " with ", stored);
    if (stored == at::kFloat) return function(BFloat16(), float());
    TORCH_CHECK(stored == at::kBFloat16, "no experts of ", type, " with ", stored);
    function(BFloat16(), BFloat16());
  }
};

template <typename T>
std::array<T*, 3> starts_of(at::TensorList tensors) {
  std::array<T*, 3> found{};
  for (int64_t side = 0; side < 3; ++side)
    if (tensors[side].numel()) found[side] = static_cast<T*>(tensors[side].data_ptr());
  return found;
}

template <typename T>
std::array<const T*, 3> read_of(at::TensorList tensors) {
  std::array<const T*, 3> found{};
  for (int64_t side = 0; side < 3; ++side)
    if (tensors[side].numel()) found[side] = tensors[side].const_data_ptr<T>();
  return found;
}

// Whether this processor gains by it; with tiles torch's own products are as fast.
bool learns_experts() {
#if defined(MOE_DIST_TILES)
  if (tiles::exist()) return false;
#endif
#if defined(CPU_CAPABILITY_AVX512)
  return true;
#else
  return false;
#endif
}

// Lists are of the layers in, gate and out; what there is none of is an empty tensor. Gives the outputs
// and, where they are kept, what the activation reads.
std::vector<Tensor> experts(const Tensor& rows, at::IntArrayRef sizes, at::TensorList weights, at::TensorList biases,
                            int64_t activation, bool keeps) {
  const Call call(rows, sizes, weights, activation);
  const Sizes& s = call.s;
  TORCH_CHECK(biases.size() == 3, "three layers have ", biases.size(), " biases");
  for (int64_t side = 0; side < 3; ++side)
    if (biases[side].numel()) check_stack(biases[side], {call.E, s.outputs(side)}, call.type);
  std::vector<Tensor> found = {at::empty_like(rows)};
  for (int64_t i = 0; keeps && i < (s.gated ? 2 : 1); ++i) found.push_back(at::empty({s.S, s.F}, rows.options()));
  call.with_types([&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    const auto place = [&](size_t i) { return i < found.size() ? found[i].mutable_data_ptr<T>() : nullptr; };
    forward<T, W>(s, plan(sizes, std::max<int64_t>(1, s.S)), rows.const_data_ptr<T>(), {read_of<W>(weights)},
                  read_of<T>(biases), activation, place(0), place(1), place(2));
  });
  return found;
}

// Writes gradients of weights and biases, and gives that of the rows, or an empty tensor. `begun` says
// for each layer and expert whether its gradient is added to what is there.
Tensor experts_backward(const Tensor& grad, const Tensor& rows, at::TensorList kept, at::IntArrayRef sizes,
                        at::TensorList weights, int64_t activation, bool needs_rows, at::TensorList sums,
                        at::TensorList bias_sums, std::array<std::vector<bool>, 3> begun) {
  const Call call(rows, sizes, weights, activation);
  const Sizes& s = call.s;
  check_stack(grad, rows.sizes(), call.type);
  TORCH_CHECK(kept.size() == (s.gated ? 2 : 1), "what the activation read is missing");
  for (const Tensor& one : kept) check_stack(one, {s.S, s.F}, call.type);
  for (int64_t side = 0; side < 3; ++side) {
    if (bias_sums[side].numel()) check_stack(bias_sums[side], {call.E, s.outputs(side)}, at::kFloat);
    if (sums[side].numel()) check_stack(sums[side], weights[side].sizes(), call.stored);
  }
  Tensor grad_rows = needs_rows ? at::empty_like(rows) : at::empty({0}, rows.options());
  call.with_types([&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    backward<T, W>(s, plan(sizes, kGroup), grad.const_data_ptr<T>(), rows.const_data_ptr<T>(),
                   kept[0].const_data_ptr<T>(), s.gated ? kept[1].const_data_ptr<T>() : nullptr,
                   {read_of<W>(weights)}, activation, needs_rows ? grad_rows.mutable_data_ptr<T>() : nullptr,
                   {starts_of<W>(sums), starts_of<float>(bias_sums), begun});
  });
  return grad_rows;
}

Tensor experts_backward_op(const Tensor& grad, const Tensor& rows, at::TensorList kept, at::IntArrayRef sizes,
                           at::TensorList weights, int64_t activation, bool needs_rows, at::TensorList sums,
                           at::TensorList bias_sums, at::IntArrayRef begun) {
  TORCH_CHECK(sums.size() == 3 && bias_sums.size() == 3 && begun.size() == 3 * sizes.size(), "three layers have ",
              sums.size(), ", ", bias_sums.size(), " and ", begun.size());
  std::array<std::vector<bool>, 3> sides;
  for (size_t side = 0; side < 3; ++side)
    sides[side].assign(begun.begin() + side * sizes.size(), begun.begin() + (side + 1) * sizes.size());
  return experts_backward(grad, rows, kept, sizes, weights, activation, needs_rows, sums, bias_sums, sides);
}

}  // namespace
}  // namespace moe_dist

TORCH_LIBRARY_FRAGMENT(moe_dist, library) {
  library.def("learns_experts() -> bool", &moe_dist::learns_experts);
  library.def(
      "experts(Tensor rows, int[] sizes, Tensor[] weights, Tensor[] biases, int activation, bool keeps) -> Tensor[]");
  library.def(
      "experts_backward(Tensor grad, Tensor rows, Tensor[] kept, int[] sizes, Tensor[] weights, int activation, "
      "bool needs_rows, Tensor(a!)[] sums, Tensor(b!)[] bias_sums, int[] begun) -> Tensor");
}

TORCH_LIBRARY_IMPL(moe_dist, CPU, library) {
  library.impl("experts", moe_dist::experts);
  library.impl("experts_backward", moe_dist::experts_backward_op);
}
