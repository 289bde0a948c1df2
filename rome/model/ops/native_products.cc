// Products of a call's tokens with matrices, and norms, on a CPU; tests compare them with the XLA
// forms.
//
// T tokens, I inputs, O outputs, N rows, D width.
//
// Every number of a token is a sum over the inputs from the first to the last, whatever else is in
// the call: libraries choose another order for a few rows than for many.

#include "native.h"

namespace {

constexpr int64_t kUnits = 4;         // of a thread
constexpr int64_t kLeastStripe = 64;  // columns of a unit
// Multiplications and additions that take about as long as a thread takes to begin.
constexpr int64_t kWorthAThread = 1 << 18;

struct Matrix {
  const float* w;
  int64_t O;
  bool transposed;  // w is [O, I]
  float* out;       // [T, O]
};

struct Unit {
  const Matrix* matrix;
  int64_t begin, end;   // columns, at most kStripe
  int64_t first, last;  // rows
};

// Copy inputs [first, last) of columns [begin, end) to [inputs, width], filled up with zeros.
void fill_up(const Matrix& matrix, int64_t I, int64_t first, int64_t last, int64_t begin,
             int64_t end, int64_t width, float* to) {
  if (end - begin < width) std::fill(to, to + (last - first) * width, 0.0f);
  if (!matrix.transposed) {
    for (int64_t i = first; i < last; ++i, to += width) {
      std::memcpy(to, matrix.w + i * matrix.O + begin, (end - begin) * sizeof(float));
    }
    return;
  }
  for (int64_t at = begin; at < end; ++at) {
    const float* row = matrix.w + at * I;
    for (int64_t i = first; i < last; ++i) to[(i - first) * width + at - begin] = row[i];
  }
}

void multiply(const Unit& unit, const float* x_TI, int64_t I) {
  thread_local std::vector<float> filled;
  thread_local std::vector<const float*> x;
  thread_local Sums kept;
  const Matrix& matrix = *unit.matrix;
  const int64_t columns = unit.end - unit.begin, rows = unit.last - unit.first;
  const int64_t width = (columns + kLanes - 1) / kLanes * kLanes;
  float* const* sums = kept.zeros(rows, width);
  x.resize(rows);
  for (int64_t row = 0; row < rows; ++row) x[row] = x_TI + (unit.first + row) * I;
  if (!matrix.transposed && columns == width) {
    multiply_rows(rows, x.data(), matrix.w + unit.begin, I, matrix.O, width, sums);
  } else {
    filled.resize(kDepth * width);
    for (int64_t i = 0; i < I; i += kDepth) {
      const int64_t depth = std::min(kDepth, I - i);
      fill_up(matrix, I, i, i + depth, unit.begin, unit.end, width, filled.data());
      multiply_rows(rows, x.data(), filled.data(), depth, width, width, sums);
      for (const float*& row : x) row += depth;
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(matrix.out + (unit.first + row) * matrix.O + unit.begin, sums[row],
                columns * sizeof(float));
  }
}

std::vector<Unit> make_units(const std::vector<Matrix>& matrices, int64_t T, int64_t threads) {
  int64_t columns = 0;
  for (const Matrix& matrix : matrices) columns += matrix.O;
  // Several units a thread, so that none waits long for the others at the end.
  const int64_t share = columns / (kUnits * threads) / kPanel * kPanel;
  const int64_t stripe = std::clamp<int64_t>(share, kLeastStripe, kStripe);
  int64_t blocks = 0;
  for (const Matrix& matrix : matrices) blocks += (matrix.O + stripe - 1) / stripe;
  const int64_t parts = std::clamp<int64_t>(kUnits * threads / blocks, 1, (T + 63) / 64);
  const int64_t groups = (T + kMaxRows - 1) / kMaxRows;
  std::vector<Unit> units;
  for (const Matrix& matrix : matrices) {
    for (int64_t at = 0; at < matrix.O; at += stripe) {
      for (int64_t part = 0; part < parts; ++part) {
        units.push_back({&matrix, at, std::min(at + stripe, matrix.O),
                         groups * part / parts * kMaxRows,
                         std::min(groups * (part + 1) / parts * kMaxRows, T)});
      }
    }
  }
  return units;
}

ffi::Error run_products(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_TI, ffi::RemainingArgs weights,
                        ffi::RemainingRets outs, bool transposed) {
  const int64_t T = x_TI.dimensions()[0], I = x_TI.dimensions()[1];
  std::vector<Matrix> matrices;
  int64_t work = 0;
  for (size_t number = 0; number < weights.size(); ++number) {
    const auto w = weights.get<ffi::Buffer<ffi::F32>>(number);
    auto out = outs.get<ffi::Buffer<ffi::F32>>(number);
    if (w.has_error() || out.has_error()) {
      return ffi::Error::InvalidArgument("matrices and products must be float32");
    }
    const int64_t inputs = w->dimensions()[transposed ? 1 : 0];
    const int64_t O = w->dimensions()[transposed ? 0 : 1];
    if (inputs != I) return ffi::Error::InvalidArgument("a matrix does not fit the inputs");
    matrices.push_back({w->typed_data(), O, transposed, (*out)->typed_data()});
    work += T * I * O;
  }
  const std::vector<Unit> units = make_units(matrices, T, pool.num_threads());
  const auto run = [&](int64_t number) { multiply(units[number], x_TI.typed_data(), I); };
  if (work < kWorthAThread) {
    for (size_t number = 0; number < units.size(); ++number) run(number);
  } else {
    for_each(pool, units.size(), run);
  }
  return ffi::Error::Success();
}

// x / rms(x) * scale for each row.
ffi::Error run_norm(ffi::Buffer<ffi::F32> x_ND, ffi::Buffer<ffi::F32> scale_D,
                    ffi::ResultBuffer<ffi::F32> out_ND, float epsilon) {
  const int64_t N = x_ND.dimensions()[0], D = x_ND.dimensions()[1];
  if (D % kLanes) return ffi::Error::InvalidArgument("the width must be whole vectors");
  const float* scale = scale_D.typed_data();
  for (int64_t n = 0; n < N; ++n) {
    const float* x = x_ND.typed_data() + n * D;
    float* out = out_ND->typed_data() + n * D;
    Vec squares = Vec{};
    for (int64_t d = 0; d < D; d += kLanes) squares = fused(load(x + d), load(x + d), squares);
    const float factor = 1.0f / std::sqrt(add_lanes<kLanes>(squares) / D + epsilon);
    for (int64_t d = 0; d < D; d += kLanes) store(out + d, load(x + d) * factor * load(scale + d));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_norm, run_norm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(rome_products, run_products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("transposed"));
