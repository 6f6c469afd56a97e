// The CPU kernel of experts: every stage of the layer in one call. Letters are those of ops/experts.py.

typedef int32_t VS __attribute__((vector_size(VL * 4)));

// e ** x to about 2 units in the last place: x = n ln 2 + r, and a polynomial in r (Cephes).
static inline V exponential(V x) {
  const V low = V{} - 87.3f, high = V{} + 88.3f;
  const V bounded = x < low ? low : (x > high ? high : x);
  const V scaled = bounded * 1.44269504f;
  const VS n = __builtin_convertvector(scaled + (scaled < 0 ? V{} - 0.5f : V{} + 0.5f), VS);
  const V n_float = __builtin_convertvector(n, V);
  const V r = bounded - n_float * 0.693359375f + n_float * 2.12194440e-4f;
  V p = V{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const V y = (p * r * r + r + 1.0f) * (V)((n + 127) << 23);
  return x == x ? y : x;
}

struct Experts {  // as ops/_cpu.py packs it
  void* out;
  const void *x, *ids, *weights, *w_up, *w_down, *bias_up, *bias_down;
  i64 dtype, dtype_weights, dtype_out, ids_are_long, T, K, E, H, G, F, O, stride_x;
  i64 up_e, up_h, up_g, down_e, down_h, down_g, interleaved, clamped, threads;
  double alpha, limit, up_shift;
};

static inline V gated(const Experts& a, V gate, V up) {
  if (a.clamped) {
    const V high = V{} + (float)a.limit, low = V{} - (float)a.limit;
    gate = gate > high ? high : gate;
    up = up > high ? high : (up < low ? low : up);
  }
  return gate / (1.0f + exponential(gate * -(float)a.alpha)) * (up + (float)a.up_shift);
}

// One row [2F] of the up GEMM to one row [F].
template <class T>
static void activate(const Experts& a, const T* x, T* y) {
  float pair[2 * VL], gate[VL], up[VL];
  for (i64 f = 0; f < a.F; f += VL) {
    const i64 n = std::min<i64>(VL, a.F - f);
    V g, u;
    if (a.interleaved) {
      for (i64 i = 0; i < 2; i++) {
        const i64 left = std::max<i64>(0, std::min<i64>(VL, 2 * n - i * VL));
        narrow(pair + i * VL, wide(x + 2 * f + i * VL, left));
      }
      for (i64 i = 0; i < VL; i++) gate[i] = pair[2 * i], up[i] = pair[2 * i + 1];
      g = wide(gate), u = wide(up);
    } else if (n == VL) {
      g = wide(x + f), u = wide(x + a.F + f);
    } else {
      g = wide(x + f, n), u = wide(x + a.F + f, n);
    }
    if (n == VL) narrow(y + f, gated(a, g, u));
    else narrow(y + f, gated(a, g, u), n);
  }
}

extern "C" int moe_experts(const Experts* args) {
  const Experts& a = *args;
  const i64 R = a.T * a.K;
  std::unique_ptr<int32_t[]> ints(new int32_t[2 * R + a.E]);
  int32_t *rows = ints.get(), *position = rows + R, *offsets = position + R;
  const SortTokens sort{rows, offsets, position, a.ids, a.ids_are_long, R, a.E};
  moe_sort_tokens(&sort);
  const i64 size = a.dtype == 0 ? 4 : 2, all = R + 1;
  std::unique_ptr<char[]> scratch(new char[R * (a.G + a.F + a.O) * size]);
  char *g = scratch.get(), *h = g + R * a.G * size, *y = h + R * a.F * size;
  const GroupedMM up{g,    a.x, a.w_up, a.bias_up, offsets,    rows,   a.dtype, a.T, R,   a.E,
                     a.H,  a.G, a.K,    a.stride_x, a.up_e,    a.up_h, a.up_g,  a.G, all, a.threads};
  if (moe_grouped_mm(&up)) return 1;
  const i64 owned = a.E ? offsets[a.E - 1] : 0;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    const i64 threads = std::min(a.threads, 1 + owned * a.F / 8192);  // 8192: about 5 us
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (i64 r = 0; r < owned; r++) activate(a, (const T*)g + r * a.G, (T*)h + r * a.F);
  });
  const GroupedMM down{y,   h,   a.w_down, a.bias_down, offsets,  nullptr,  a.dtype,  R,   R,   a.E,
                       a.F, a.O, 1,        a.F,         a.down_e, a.down_h, a.down_g, a.O, all, a.threads};
  if (moe_grouped_mm(&down)) return 1;
  const Combine sum{a.out, y, a.weights, position, a.dtype_out, a.dtype, a.dtype_weights,
                    a.T,   a.K, R,       a.O,      a.O,         a.threads};
  return moe_combine(&sum);
}
