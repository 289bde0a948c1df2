// The engine's forward pass on a CPU where XLA's own forms are slow: the experts of few tokens, and
// attention over pages. Built and registered by native.py; tests compare both with the XLA forms.
//
// T tokens, D model, E experts, k experts a token, F expert hidden, N query heads, K key heads, H
// head dim, R rows of the block table, M pages of a row, P positions of a page.
//
// Every number of a token is computed in an order that depends on this token only: a sum over the
// depth of a product, or over keys, runs from the first to the last whatever else is in the call.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kWide = 4;                      // vectors of a block of columns
constexpr int kColumns = kLanes * kWide;      // of a block
constexpr int kMaxRows = kLanes == 16 ? 6 : 2;  // of a block: its sums stay in registers

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec all(float value) { return value - Vec{}; }  // compiles to one broadcast

// exp by a polynomial on [-ln 2 / 2, ln 2 / 2], relative error below 2e-7.
inline Vec exp_of(Vec x) {
  const Vec low = all(-87.0f), high = all(88.0f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec scaled = x * 1.44269504f;
  const Vec half = scaled < 0.0f ? all(-0.5f) : all(0.5f);
  const IntVec power = __builtin_convertvector(scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(power, Vec);
  const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vec sum = all(1.9875691500e-4f);
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const IntVec bits = (power + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return sum * scale;
}

template <int Lanes>
struct Lane {
  typedef float Type __attribute__((vector_size(Lanes * 4), aligned(4)));
};

// Add the lanes, halves first, always in the same order.
template <int Lanes>
inline float add_lanes(typename Lane<Lanes>::Type value) {
  if constexpr (Lanes == 1) {
    return value[0];
  } else {
    typename Lane<Lanes / 2>::Type low, high;
    std::memcpy(&low, &value, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    return add_lanes<Lanes / 2>(low + high);
  }
}

// Call work(0) ... work(count - 1) on the calling thread and on those of XLA's pool that are free.
// Nobody waits for a thread that has not begun.
void for_each(ffi::ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& work) {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  const auto* unit = &work;  // not touched by a thread that comes after the last unit was taken
  auto take_all = [shared, count, unit] {
    for (;;) {
      const int64_t mine = shared->next.fetch_add(1);
      if (mine >= count) return;
      (*unit)(mine);
      shared->done.fetch_add(1);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(take_all));
  take_all();
  while (shared->done.load() < count) std::this_thread::yield();
}

// out[r][0:columns] = sum over d of x[r][d] * w[d][0:columns], for `Rows` rows.
template <int Rows, int Wide>
inline __attribute__((always_inline)) void multiply_block(const float* const* x, const float* w,
                                                          int64_t depth, int64_t stride,
                                                          Vec out[Rows][Wide]) {
  const float* row[Rows];
  Vec sum[Rows][Wide];  // in registers
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    row[r] = x[r];
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) sum[r][v] = Vec{};
  }
  for (int64_t d = 0; d < depth; ++d, w += stride) {
    Vec w_row[Wide];
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) w_row[v] = load(w + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec x_r = all(row[r][d]);
#pragma GCC unroll 8
      for (int v = 0; v < Wide; ++v) sum[r][v] += x_r * w_row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Wide; ++v) out[r][v] = sum[r][v];
  }
}

// The hidden values of some choices of one expert, in columns [begin, end).
struct Mlp {
  int64_t D, F;
  const float *gate, *up, *down;  // of one expert
};

template <int Rows>
void hidden_block(const Mlp& mlp, const float* const* x, const float* weight, int64_t at,
                  int64_t wide, float* const* hidden) {
  const auto finish = [&](int r, int64_t column, Vec gate, Vec up) {
    store(hidden[r] + column, gate / (1.0f + exp_of(-gate)) * up * weight[r]);
  };
  if (wide == kWide) {
    Vec gate[Rows][kWide], up[Rows][kWide];
    multiply_block<Rows, kWide>(x, mlp.gate + at, mlp.D, mlp.F, gate);
    multiply_block<Rows, kWide>(x, mlp.up + at, mlp.D, mlp.F, up);
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kWide; ++v) finish(r, at + v * kLanes, gate[r][v], up[r][v]);
    }
    return;
  }
  for (int64_t v = 0; v < wide; ++v) {
    Vec gate[Rows][1], up[Rows][1];
    multiply_block<Rows, 1>(x, mlp.gate + at + v * kLanes, mlp.D, mlp.F, gate);
    multiply_block<Rows, 1>(x, mlp.up + at + v * kLanes, mlp.D, mlp.F, up);
    for (int r = 0; r < Rows; ++r) finish(r, at + v * kLanes, gate[r][0], up[r][0]);
  }
}

template <int Rows>
void down_block(const Mlp& mlp, const float* const* hidden, int64_t at, int64_t wide,
                float* const* out) {
  if (wide == kWide) {
    Vec sum[Rows][kWide];
    multiply_block<Rows, kWide>(hidden, mlp.down + at, mlp.F, mlp.D, sum);
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < kWide; ++v) store(out[r] + at + v * kLanes, sum[r][v]);
    }
    return;
  }
  for (int64_t v = 0; v < wide; ++v) {
    Vec sum[Rows][1];
    multiply_block<Rows, 1>(hidden, mlp.down + at + v * kLanes, mlp.F, mlp.D, sum);
    for (int r = 0; r < Rows; ++r) store(out[r] + at + v * kLanes, sum[r][0]);
  }
}

// Call block<Rows> over `rows` rows, at most kMaxRows at a time: block(Rows as a constant, first).
template <typename Block>
void over_rows(int64_t rows, const Block& block) {
  for (int64_t first = 0; first < rows;) {
    const int64_t left = std::min<int64_t>(rows - first, kMaxRows);
    switch (left) {
      case 1: block(std::integral_constant<int, 1>{}, first); break;
      case 2: block(std::integral_constant<int, 2>{}, first); break;
#ifdef __AVX512F__
      case 3: block(std::integral_constant<int, 3>{}, first); break;
      case 4: block(std::integral_constant<int, 4>{}, first); break;
      case 5: block(std::integral_constant<int, 5>{}, first); break;
      default: block(std::integral_constant<int, 6>{}, first); break;
#endif
    }
    first += left;
  }
}

ffi::Error run_experts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_TD,
                       ffi::Buffer<ffi::F32> gate_EDF, ffi::Buffer<ffi::F32> up_EDF,
                       ffi::Buffer<ffi::F32> down_EFD, ffi::Buffer<ffi::F32> weights_Tk,
                       ffi::Buffer<ffi::S32> ids_Tk, ffi::ResultBuffer<ffi::F32> out_TD) {
  const int64_t T = x_TD.dimensions()[0], k = ids_Tk.dimensions()[1];
  const int64_t E = gate_EDF.dimensions()[0];
  const int64_t D = gate_EDF.dimensions()[1], F = gate_EDF.dimensions()[2];
  if (D % kLanes || F % kLanes) {
    return ffi::Error::InvalidArgument("the widths must be whole vectors");
  }
  const int64_t A = T * k;
  const int32_t* ids = ids_Tk.typed_data();
  const float* weights = weights_Tk.typed_data();
  // choices by expert, in the order of tokens
  std::vector<std::vector<int64_t>> choices(E);
  for (int64_t a = 0; a < A; ++a) {
    if (ids[a] >= 0 && ids[a] < E) choices[ids[a]].push_back(a);
  }
  struct Unit {
    int64_t e, begin, end;  // columns
  };
  std::vector<Unit> to_hidden, to_out;
  for (int64_t e = 0; e < E; ++e) {
    if (choices[e].empty()) continue;
    for (int64_t f = 0; f < F; f += kColumns) to_hidden.push_back({e, f, std::min(f + kColumns, F)});
    for (int64_t d = 0; d < D; d += kColumns) to_out.push_back({e, d, std::min(d + kColumns, D)});
  }
  std::unique_ptr<float[]> hidden_AF(new float[A * F]), out_AD(new float[A * D]);
  const auto mlp_of = [&](int64_t e) {
    return Mlp{D, F, gate_EDF.typed_data() + e * D * F, up_EDF.typed_data() + e * D * F,
               down_EFD.typed_data() + e * D * F};
  };
  for_each(pool, to_hidden.size(), [&](int64_t number) {
    const Unit& unit = to_hidden[number];
    const auto& own = choices[unit.e];
    over_rows(own.size(), [&](auto rows, int64_t first) {
      constexpr int Rows = decltype(rows)::value;
      const float* x[Rows];
      float* hidden[Rows];
      float weight[Rows];
      for (int r = 0; r < Rows; ++r) {
        const int64_t a = own[first + r];
        x[r] = x_TD.typed_data() + a / k * D;
        hidden[r] = hidden_AF.get() + a * F;
        weight[r] = weights[a];
      }
      hidden_block<Rows>(mlp_of(unit.e), x, weight, unit.begin, (unit.end - unit.begin) / kLanes,
                         hidden);
    });
  });
  for_each(pool, to_out.size(), [&](int64_t number) {
    const Unit& unit = to_out[number];
    const auto& own = choices[unit.e];
    over_rows(own.size(), [&](auto rows, int64_t first) {
      constexpr int Rows = decltype(rows)::value;
      const float* hidden[Rows];
      float* out[Rows];
      for (int r = 0; r < Rows; ++r) {
        hidden[r] = hidden_AF.get() + own[first + r] * F;
        out[r] = out_AD.get() + own[first + r] * D;
      }
      down_block<Rows>(mlp_of(unit.e), hidden, unit.begin, (unit.end - unit.begin) / kLanes, out);
    });
  });
  float* result = out_TD->typed_data();
  for (int64_t t = 0; t < T; ++t) {
    float* row = result + t * D;
    std::fill(row, row + D, 0.0f);
    for (int64_t a = t * k; a < (t + 1) * k; ++a) {
      if (ids[a] < 0 || ids[a] >= E) continue;
      for (int64_t d = 0; d < D; ++d) row[d] += out_AD[a * D + d];
    }
  }
  return ffi::Error::Success();
}

// All heads of one token over the positions that it sees, each position's memory read in order.
//
// at[s] is where position s lies: the key of the first head, its value, the key of the second, ...
void attend(const std::vector<const float*>& at, const float* q, int64_t K, int64_t G, int64_t H,
            float* out) {
  thread_local std::vector<float> scores;
  const int64_t N = K * G, seen = at.size();
  const int64_t width = (seen + kLanes - 1) / kLanes * kLanes;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  scores.assign(N * width, -1e30f);
  for (int64_t s = 0; s < seen; ++s) {
    const float* key = at[s];
    float* score = scores.data() + s;
    const float* query = q;
    for (int64_t k = 0; k < K; ++k, key += 2 * H) {
      for (int64_t g = 0; g < G; ++g, query += H, score += width) {
        Vec sum = Vec{};
        for (int64_t h = 0; h < H; h += kLanes) sum += load(query + h) * load(key + h);
        *score = add_lanes<kLanes>(sum) * scale;
      }
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    float* own = scores.data() + n * width;
    const float top = *std::max_element(own, own + seen);
    float total = 0.0f;
    for (int64_t s = 0; s < width; s += kLanes) store(own + s, exp_of(load(own + s) - top));
    for (int64_t s = 0; s < seen; ++s) total += own[s];
    for (int64_t s = 0; s < seen; ++s) own[s] /= total;
  }
  std::fill(out, out + N * H, 0.0f);
  for (int64_t s = 0; s < seen; ++s) {
    const float* value = at[s] + H;
    const float* score = scores.data() + s;
    float* own = out;
    for (int64_t k = 0; k < K; ++k, value += 2 * H) {
      for (int64_t g = 0; g < G; ++g, own += H, score += width) {
        const Vec weight = all(*score);
        for (int64_t h = 0; h < H; h += kLanes) {
          store(own + h, load(own + h) + weight * load(value + h));
        }
      }
    }
  }
}

ffi::Error run_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q_TNH,
                         ffi::Buffer<ffi::F32> kv_TKH, ffi::Buffer<ffi::S32> row_T,
                         ffi::Buffer<ffi::S32> position_T, ffi::Buffer<ffi::S32> table_RM,
                         ffi::Buffer<ffi::F32> pages, ffi::ResultBuffer<ffi::F32> out_TNH,
                         ffi::ResultBuffer<ffi::F32> new_pages) {
  const int64_t T = q_TNH.dimensions()[0], N = q_TNH.dimensions()[1], H = q_TNH.dimensions()[2];
  const int64_t K = kv_TKH.dimensions()[1] / 2;
  const int64_t P = pages.dimensions()[1], M = table_RM.dimensions()[1];
  const int64_t stride = 2 * K * H;
  if (H % kLanes) return ffi::Error::InvalidArgument("a head must be whole vectors");
  float* kv = new_pages->typed_data();
  if (kv != pages.typed_data()) std::memcpy(kv, pages.typed_data(), pages.size_bytes());
  const int32_t *row = row_T.typed_data(), *position = position_T.typed_data();
  const int32_t* table = table_RM.typed_data();
  for (int64_t t = 0; t < T; ++t) {
    if (position[t] < 0) continue;  // padding
    const int64_t page = table[row[t] * M + position[t] / P];
    std::memcpy(kv + (page * P + position[t] % P) * stride, kv_TKH.typed_data() + t * stride,
                stride * sizeof(float));
  }
  for_each(pool, T, [&](int64_t t) {
    float* out = out_TNH->typed_data() + t * N * H;
    if (position[t] < 0) {
      std::fill(out, out + N * H, 0.0f);
      return;
    }
    thread_local std::vector<const float*> at;
    at.clear();
    for (int64_t first = 0; first <= position[t]; first += P) {
      const float* page = kv + int64_t{table[row[t] * M + first / P]} * P * stride;
      const int64_t used = std::min<int64_t>(P, position[t] + 1 - first);
      for (int64_t s = 0; s < used; ++s) at.push_back(page + s * stride);
    }
    attend(at, q_TNH.typed_data() + t * N * H, K, N / K, H, out);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_experts, run_experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_paged_attention, run_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
