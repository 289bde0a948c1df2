// The experts of few tokens on a CPU, with and without adapters; tests compare them with the XLA
// forms.
//
// T tokens, D model, E experts, k experts a token, A = T * k choices, F expert hidden, S slots of
// adapters.
//
// Every number of a token is computed in an order that depends on this token only: a sum over the
// depth of a product runs from the first to the last whatever else is in the call.

#include "native.h"

namespace {

constexpr int64_t kSummed = 32;  // tokens whose choices a thread adds up

struct Call {
  int64_t T, D, E, F, k;
  const float *x, *gate, *up, *down, *weights;
  const int32_t* ids;
};

// What an adapter adds to a product: low x b, for rows whose low[r] = scale * (x[r] x a) is known.
struct Addend {
  int64_t rank = 0;  // 0: nothing is added
  const float* const* low = nullptr;
  const float* b = nullptr;
};

// Add what an adapter adds to columns [begin, begin + width) of rows.
void add_low_rank(const Addend& addend, int64_t count, int64_t begin, int64_t width, int64_t stride,
                  float* const* sums) {
  if (!addend.rank) return;
  thread_local Sums more;
  float* const* own = more.zeros(count, width);
  multiply_rows(count, addend.low, addend.b + begin, addend.rank, stride, width, own);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t at = 0; at < width; at += kLanes) {
      store(sums[r] + at, load(sums[r] + at) + load(own[r] + at));
    }
  }
}

// One of the three products of the adapters: a [S, E, in, rank] and b [S, E, rank, out].
struct LowRank {
  int64_t rank = 0;
  const float *a = nullptr, *b = nullptr;
};

// The adapters of a call's tokens; without slots there are none.
struct Adapters {
  int64_t slots = 0;
  const int32_t* slot_T = nullptr;  // negative: the token has none
  const float* scale_S = nullptr;
  LowRank gate, up, down;
};

struct Group {
  int64_t e, slot;  // slot -1: no adapter
  std::vector<int64_t> choices;
};

// The choices of one expert with one adapter, in the order of tokens.
std::vector<Group> group_choices(const Call& call, const Adapters& adapters) {
  const int64_t ways = adapters.slots + 1;
  std::vector<Group> all_groups(call.E * ways);
  for (int64_t a = 0; a < call.T * call.k; ++a) {
    const int64_t e = call.ids[a];
    if (e < 0 || e >= call.E) continue;
    const int64_t given = adapters.slots ? adapters.slot_T[a / call.k] : -1;
    const int64_t slot = given >= 0 && given < adapters.slots ? given : -1;
    Group& group = all_groups[e * ways + slot + 1];
    group.e = e;
    group.slot = slot;
    group.choices.push_back(a);
  }
  std::vector<Group> groups;
  for (Group& group : all_groups) {
    if (!group.choices.empty()) groups.push_back(std::move(group));
  }
  return groups;
}

// Set low[a] = scale * (x of a) x A, [A, rank], for the choices of all groups with an adapter.
template <typename RowOf>
void multiply_low(ffi::ThreadPool& pool, const std::vector<Group>& groups, const LowRank& pair,
                  const Call& call, const Adapters& adapters, int64_t depth, const RowOf& row_of,
                  float* low) {
  if (!pair.rank) return;
  for_each(pool, groups.size(), [&](int64_t number) {
    const Group& group = groups[number];
    if (group.slot < 0) return;
    const float* a_matrix = pair.a + (group.slot * call.E + group.e) * depth * pair.rank;
    const float scale = adapters.scale_S[group.slot];
    over_rows(group.choices.size(), [&](auto rows, int64_t first) {
      constexpr int Rows = decltype(rows)::value;
      const float* x[Rows];
      for (int r = 0; r < Rows; ++r) x[r] = row_of(group.choices[first + r]);
      for (int64_t at = 0; at < pair.rank; at += kLanes) {
        Vec sum[Rows][1];
        multiply_block<Rows, 1>(x, a_matrix + at, depth, pair.rank, sum);
        for (int r = 0; r < Rows; ++r) {
          store(low + group.choices[first + r] * pair.rank + at, sum[r][0] * scale);
        }
      }
    });
  });
}

// What `pair` adds for the choices of a group; `rows` is where pointers are kept.
Addend addend_of(const Group& group, const LowRank& pair, int64_t E, int64_t width,
                 const float* low, std::vector<const float*>& rows) {
  if (group.slot < 0 || !pair.rank) return {};
  rows.clear();
  for (const int64_t a : group.choices) rows.push_back(low + a * pair.rank);
  return {pair.rank, rows.data(), pair.b + (group.slot * E + group.e) * pair.rank * width};
}

ffi::Error compute(ffi::ThreadPool& pool, const Call& call, const Adapters& adapters,
                   float* result) {
  const int64_t D = call.D, F = call.F, E = call.E, A = call.T * call.k;
  if (D % kLanes || F % kLanes) {
    return ffi::Error::InvalidArgument("the widths must be whole vectors");
  }
  for (const LowRank* pair : {&adapters.gate, &adapters.up, &adapters.down}) {
    if (pair->rank % kLanes) return ffi::Error::InvalidArgument("a rank must be whole vectors");
  }
  const std::vector<Group> groups = group_choices(call, adapters);
  struct Unit {
    const Group* group;
    int64_t begin, end;  // columns
  };
  std::vector<Unit> to_hidden, to_out;
  for (const Group& group : groups) {
    for (int64_t f = 0; f < F; f += kStripe) {
      to_hidden.push_back({&group, f, std::min(f + kStripe, F)});
    }
    for (int64_t d = 0; d < D; d += kStripe) {
      to_out.push_back({&group, d, std::min(d + kStripe, D)});
    }
  }
  const auto room = [A](int64_t width) { return std::unique_ptr<float[]>(new float[A * width]); };
  const auto hidden_AF = room(F), out_AD = room(D), gate_low = room(adapters.gate.rank),
             up_low = room(adapters.up.rank), down_low = room(adapters.down.rank);
  const auto x_of = [&](int64_t a) { return call.x + a / call.k * D; };
  const auto hidden_of = [&](int64_t a) { return hidden_AF.get() + a * F; };
  multiply_low(pool, groups, adapters.gate, call, adapters, D, x_of, gate_low.get());
  multiply_low(pool, groups, adapters.up, call, adapters, D, x_of, up_low.get());
  for_each(pool, to_hidden.size(), [&](int64_t number) {
    const Unit& unit = to_hidden[number];
    const Group& group = *unit.group;
    const int64_t count = group.choices.size(), width = unit.end - unit.begin;
    const int64_t matrix = group.e * D * F + unit.begin;
    thread_local std::vector<const float*> x, gate_rows, up_rows;
    thread_local Sums of_gate, of_up;
    x.clear();
    for (const int64_t a : group.choices) x.push_back(x_of(a));
    const Addend gate_more = addend_of(group, adapters.gate, E, F, gate_low.get(), gate_rows);
    const Addend up_more = addend_of(group, adapters.up, E, F, up_low.get(), up_rows);
    float* const* gate = of_gate.zeros(count, width);
    multiply_rows(count, x.data(), call.gate + matrix, D, F, width, gate);
    add_low_rank(gate_more, count, unit.begin, width, F, gate);
    float* const* up = of_up.zeros(count, width);
    multiply_rows(count, x.data(), call.up + matrix, D, F, width, up);
    add_low_rank(up_more, count, unit.begin, width, F, up);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t a = group.choices[r];
      for (int64_t at = 0; at < width; at += kLanes) {
        const Vec own = load(gate[r] + at);
        const Vec activated = own / (1.0f + exp_of(-own)) * load(up[r] + at);
        store(hidden_AF.get() + a * F + unit.begin + at, activated * call.weights[a]);
      }
    }
  });
  multiply_low(pool, groups, adapters.down, call, adapters, F, hidden_of, down_low.get());
  for_each(pool, to_out.size(), [&](int64_t number) {
    const Unit& unit = to_out[number];
    const Group& group = *unit.group;
    const int64_t count = group.choices.size(), width = unit.end - unit.begin;
    thread_local std::vector<const float*> hidden, low_rows;
    thread_local std::vector<float*> out;
    hidden.clear();
    out.clear();
    for (const int64_t a : group.choices) {
      hidden.push_back(hidden_of(a));
      out.push_back(out_AD.get() + a * D + unit.begin);
      std::fill(out.back(), out.back() + width, 0.0f);
    }
    const Addend more = addend_of(group, adapters.down, E, D, down_low.get(), low_rows);
    const float* matrix = call.down + group.e * D * F + unit.begin;
    multiply_rows(count, hidden.data(), matrix, F, D, width, out.data());
    add_low_rank(more, count, unit.begin, width, D, out.data());
  });
  const int64_t parts = (call.T + kSummed - 1) / kSummed;
  for_each(pool, parts, [&](int64_t part) {
    for (int64_t t = part * kSummed; t < std::min((part + 1) * kSummed, call.T); ++t) {
      float* row = result + t * D;
      std::fill(row, row + D, 0.0f);
      for (int64_t a = t * call.k; a < (t + 1) * call.k; ++a) {
        if (call.ids[a] < 0 || call.ids[a] >= E) continue;
        for (int64_t d = 0; d < D; ++d) row[d] += out_AD[a * D + d];
      }
    }
  });
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

Call call_of(const Floats& x_TD, const Floats& gate_EDF, const Floats& up_EDF,
             const Floats& down_EFD, const Floats& weights_Tk, const Ints& ids_Tk) {
  const auto sizes = gate_EDF.dimensions();
  return {x_TD.dimensions()[0],  sizes[1],
          sizes[0],              sizes[2],
          ids_Tk.dimensions()[1], x_TD.typed_data(),
          gate_EDF.typed_data(), up_EDF.typed_data(),
          down_EFD.typed_data(), weights_Tk.typed_data(),
          ids_Tk.typed_data()};
}

ffi::Error run_experts(ffi::ThreadPool pool, Floats x_TD, Floats gate_EDF, Floats up_EDF,
                       Floats down_EFD, Floats weights_Tk, Ints ids_Tk,
                       ffi::ResultBuffer<ffi::F32> out_TD) {
  return compute(pool, call_of(x_TD, gate_EDF, up_EDF, down_EFD, weights_Tk, ids_Tk), Adapters{},
                 out_TD->typed_data());
}

ffi::Error run_adapted_experts(ffi::ThreadPool pool, Floats x_TD, Floats gate_EDF, Floats up_EDF,
                               Floats down_EFD, Floats weights_Tk, Ints ids_Tk, Ints slot_T,
                               Floats scale_S, Floats gate_a, Floats gate_b, Floats up_a,
                               Floats up_b, Floats down_a, Floats down_b,
                               ffi::ResultBuffer<ffi::F32> out_TD) {
  const auto pair = [](const Floats& a, const Floats& b) {
    return LowRank{a.dimensions()[3], a.typed_data(), b.typed_data()};
  };
  const Adapters adapters{scale_S.dimensions()[0], slot_T.typed_data(),   scale_S.typed_data(),
                          pair(gate_a, gate_b),    pair(up_a, up_b),      pair(down_a, down_b)};
  return compute(pool, call_of(x_TD, gate_EDF, up_EDF, down_EFD, weights_Tk, ids_Tk), adapters,
                 out_TD->typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_experts, run_experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_adapted_experts, run_adapted_experts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
