// The CPU kernel of grouped_mm. Letters are those of ops/grouped_mm.py.

// How products are taken: what x is packed as (X), how many h one step takes, by layout (DOT and
// AXPY), how many vectors of features one step of AXPY makes (COLUMNS).
template <class T>
struct Floats {
  using W = T;
  using X = float;
  using Vec = V;
  static constexpr int DOT = VL, AXPY = 1, COLUMNS = 1;
  static inline Vec weights(const T* p) { return wide(p); }
  static inline Vec weights(const T* p, i64 n) { return wide(p, n); }
  static inline void columns(const T* w, i64, i64, Vec* out) { out[0] = wide(w); }
  static inline Vec spread(const float* p) { return *p - V{}; }
  static inline V fma(Vec a, Vec b, V c) { return a * b + c; }
  static inline void sort_columns(float*) {}
};

#if defined(__AVX512BF16__)
// Two bfloat16 products per float and instruction.
struct Pairs {
  using W = bf16;
  using X = bf16;
  using Vec = __m512i;
  static constexpr int DOT = 2 * VL, AXPY = 2, COLUMNS = 2;
  static inline Vec weights(const bf16* p) { return load<Vec>(p); }
  static inline Vec weights(const bf16* p, i64 n) {
    return _mm512_maskz_loadu_epi16((1u << n) - 1, p);
  }
  static inline void columns(const bf16* w, i64 stride, i64 rows, Vec* out) {
    Vec a = load<Vec>(w), b = rows > 1 ? load<Vec>(w + stride) : Vec{};
    out[0] = _mm512_unpacklo_epi16(a, b);  // features 0-3, 8-11, 16-19, 24-27
    out[1] = _mm512_unpackhi_epi16(a, b);  // the others
  }
  static inline Vec spread(const bf16* p) { return _mm512_set1_epi32(load<int32_t>(p)); }
  static inline V fma(Vec a, Vec b, V c) {
    return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static inline void sort_columns(float* p) {  // undoes what `columns` did to their order
    const __m512i lo = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
    __m512 a = (__m512)wide(p), b = (__m512)wide(p + VL);
    narrow(p, (V)_mm512_permutex2var_ps(a, lo, b));
    narrow(p + VL, (V)_mm512_permutex2var_ps(a, hi, b));
  }
};
using BFloat16 = Pairs;
#else
using BFloat16 = Floats<bf16>;
#endif

// H is contiguous: M packed rows of x times NG weight rows (`rows` of them exist) into out[m, g].
// A weight rows abreast: 1 reads the weights as they lie in memory, which is what bounds an expert
// of few rows; NG needs fewer loads, once an earlier panel has brought the weights into cache.
template <class P, int M, int A>
static void dot_tile(const typename P::X* x, const typename P::W* w, i64 stride, i64 rows, i64 H,
                     float* out, i64 ld) {
  constexpr int S = P::DOT, U = NG / A;
  V total[M][NG];
  for (int g = 0; g < NG; g += A) {
    const typename P::W* row[A];
    for (int n = 0; n < A; n++) row[n] = w + std::min<i64>(g + n, rows - 1) * stride;
    const i64 ahead = A == 1 ? AHEAD_BYTES / sizeof(*w) : NG * stride;
    const typename P::X* xp = x;
    V acc[M][NG] = {};
    auto step = [&](i64 h, int u, auto... part) {
      typename P::Vec wv[A];
      for (int n = 0; n < A; n++) {
        PREFETCH(row[n] + h + ahead);
        wv[n] = P::weights(row[n] + h, part...);
      }
      for (int m = 0; m < M; m++, xp += S) {
        auto xv = load<typename P::Vec>(xp);
        for (int n = 0; n < A; n++) acc[m][n + u * A] = P::fma(wv[n], xv, acc[m][n + u * A]);
      }
    };
    i64 h = 0;
    for (; h + U * S <= H; h += U * S)
      for (int u = 0; u < U; u++) step(h + u * S, u);
    for (; h + S <= H; h += S) step(h, 0);
    if (h < H) step(h, 0, H - h);
    for (int m = 0; m < M; m++)
      if constexpr (A == 1)
        total[m][g] = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
      else
        memcpy(total[m], acc[m], sizeof total[m]);
  }
  for (int m = 0; m < M; m++) {
    V4 v = sums(total[m]);
    memcpy(out + m * ld, &v, sizeof v);
  }
}

// G is contiguous: adds NH steps of h (H of it are left) to G features of M packed rows of x, whose
// sums stay in cache.
template <class P, int M>
static void axpy_tile(const typename P::X* x, const typename P::W* w, i64 stride, i64 H, i64 G,
                      float* out, i64 ld) {
  constexpr int S = P::AXPY, C = P::COLUMNS;
  const int steps = std::min<i64>(NH, (H + S - 1) / S);
  typename P::Vec xv[NH][M] = {};
  for (int i = 0; i < steps; i++)
    for (int m = 0; m < M; m++) xv[i][m] = P::spread(x + (i * M + m) * S);
  auto all_columns = [&](auto is_whole) {
    for (i64 g = 0; g < G; g += C * VL) {
      V acc[M][C];
      for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) acc[m][c] = wide(out + m * ld + g + c * VL);
      for (int i = 0; i < (is_whole ? NH : steps); i++) {
        typename P::Vec wv[C];
        P::columns(w + i * S * stride + g, stride, is_whole ? S : H - i * S, wv);
        for (int s = 0; s < S; s++) PREFETCH(w + ((i + AHEAD_STEPS) * S + s) * stride + g);
        for (int m = 0; m < M; m++)
          for (int c = 0; c < C; c++) acc[m][c] = P::fma(wv[c], xv[i][m], acc[m][c]);
      }
      for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) narrow(out + m * ld + g + c * VL, acc[m][c]);
    }
  };
  if (H >= NH * S) all_columns(std::true_type{});
  else all_columns(std::false_type{});
}

struct GroupedMM {  // as ops/_cpu.py packs it
  void* y;
  const void *x, *w, *bias;
  const int32_t *offsets, *rows;
  i64 dtype, N, R, E, H, G, top_k, stride_x, stride_e, stride_h, stride_g, stride_bias;
  i64 most_rows, threads;  // experts of more rows are left to the caller
};
struct Expert { i64 index, start, end; };

// The panels of `rows` rows: as few as can be, of nearly equal size.
template <class F>
static inline void for_panels(i64 rows, F f) {
  const i64 panels = (rows + MAX_M - 1) / MAX_M;
  for (i64 p = 0, r = 0; p < panels; p++) {
    const i64 next = (p + 1) * rows / panels;
    f(r, next - r);
    r = next;
  }
}

// Rows [start, start + M) as [H / S, M, S] with zeros after H: the order in which tiles read.
template <class P, int S>
static void pack(const GroupedMM& a, i64 start, i64 M, typename P::X* out, typename P::X* line) {
  const i64 steps = (a.H + S - 1) / S;
  for (i64 m = 0; m < M; m++) {
    const i64 r = start + m;
    const auto* x = (const typename P::W*)a.x + (a.rows ? a.rows[r] / a.top_k : r) * a.stride_x;
    if constexpr (std::is_same_v<decltype(x), const typename P::X*>) {
      memcpy((void*)line, x, a.H * sizeof(*x));
    } else {
      i64 h = 0;
      for (; h + VL <= a.H; h += VL) narrow(line + h, wide(x + h));
      if (h < a.H) narrow(line + h, wide(x + h, a.H - h));
    }
    for (i64 h = a.H; h < steps * S; h++) line[h] = {};
    for (i64 i = 0; i < steps; i++)
      memcpy((void*)(out + (i * M + m) * S), line + i * S, S * sizeof(*out));
  }
}

// `rows` packed rows times `num_g` features of one expert.
template <class P, bool DOT, int... M>
static void multiply(const GroupedMM& a, const typename P::X* x, i64 ld_x, const typename P::W* w,
                     i64 rows, i64 num_g, float* out, i64 ld, std::integer_sequence<int, M...>) {
  if constexpr (DOT) {
    static constexpr decltype(&dot_tile<P, 1, 1>) tiles[] = {dot_tile<P, M + 1, NG>...},
                                                  streams[] = {dot_tile<P, M + 1, 1>...};
    for (i64 g = 0; g < num_g; g += NG)
      for_panels(rows, [&](i64 r, i64 m) {
        (rows <= MAX_M ? streams : tiles)[m - 1](x + r * ld_x, w + g * a.stride_g, a.stride_g,
                                                 num_g - g, a.H, out + r * ld + g, ld);
      });
  } else {
    static constexpr decltype(&axpy_tile<P, 1>) tiles[] = {axpy_tile<P, M + 1>...};
    memset(out, 0, rows * ld * sizeof(float));
    for (i64 h = 0; h < a.H; h += NH * P::AXPY)
      for_panels(rows, [&](i64 r, i64 m) {
        tiles[m - 1](x + r * ld_x + h * m, w + h * a.stride_h, a.stride_h, a.H - h, num_g,
                     out + r * ld, ld);
      });
    for (i64 i = 0; i < rows * ld; i += P::COLUMNS * VL) P::sort_columns(out + i);
  }
}

static thread_local struct {
  std::unique_ptr<char[]> bytes;
  size_t size = 0;
} scratch;  // kept between calls: fresh pages cost more than packing

template <class P, bool DOT>
static void run(const GroupedMM& a, const Expert* experts, i64 num_experts, i64 num_rows) {
  using T = typename P::W;
  using X = typename P::X;
  constexpr int S = DOT ? P::DOT : P::AXPY;
  i64 block_g = BLOCK_G;
  if (!DOT) {  // long pieces of weight rows, but sums that stay in L1 and work for all threads
    const i64 longest = num_rows <= 4 * num_experts ? 1024 : 256;
    const i64 blocks = std::max((a.G + longest - 1) / longest, 2 * a.threads / num_experts);
    block_g = std::clamp<i64>((a.G / blocks + 63) / 64, 1, a.G / BLOCK_G) * BLOCK_G;
  }
  const i64 blocks = (a.G + block_g - 1) / block_g, ld_x = (a.H + S - 1) / S * S;
#pragma omp parallel num_threads((int)std::min(a.threads, num_experts * blocks))
  {
    const size_t sums_size = BLOCK_R * block_g * sizeof(float);
    const size_t size = sums_size + ((BLOCK_R + 1) * ld_x + VL) * sizeof(X);
    if (scratch.size < size) scratch.bytes.reset(new char[scratch.size = size]);
    float* sums = (float*)scratch.bytes.get();
    X* packed = (X*)(scratch.bytes.get() + sums_size);
    i64 packed_start = -1;
#pragma omp for schedule(dynamic, 1) nowait
    for (i64 task = 0; task < num_experts * blocks; task++) {
      const Expert& expert = experts[task / blocks];
      const i64 g_first = task % blocks * block_g, num_g = std::min(block_g, a.G - g_first);
      // axpy takes whole blocks: the last one starts earlier and computes again what it overlaps
      const i64 g_read = DOT ? g_first : std::min(g_first, a.G - block_g);
      const T* w = (const T*)a.w + expert.index * a.stride_e + g_read * a.stride_g;
      const T* bias = (const T*)a.bias + expert.index * a.stride_bias + g_first;
      for (i64 start = expert.start; start < expert.end; start += BLOCK_R) {
        const i64 rows = std::min<i64>(BLOCK_R, expert.end - start);
        if (packed_start != start)
          for_panels(rows, [&](i64 r, i64 m) {
            pack<P, S>(a, start + r, m, packed + r * ld_x, packed + rows * ld_x);
          });
        packed_start = start;
        multiply<P, DOT>(a, packed, ld_x, w, rows, DOT ? num_g : block_g, sums, block_g,
                         std::make_integer_sequence<int, MAX_M>{});
        for (i64 r = 0; r < rows; r++) {
          T* y = (T*)a.y + (start + r) * a.G + g_first;
          const float* sum = sums + r * block_g + g_first - g_read;
          i64 g = 0;
          for (; g + VL <= num_g; g += VL)
            narrow(y + g, wide(sum + g) + (a.bias ? wide(bias + g) : V{}));
          if (const i64 n = num_g - g)
            narrow(y + g, wide(sum + g, n) + (a.bias ? wide(bias + g, n) : V{}), n);
        }
      }
    }
  }
}

// Returns 0, or 1 where an index is out of range; then nothing is written.
extern "C" int moe_grouped_mm(const GroupedMM* args) {
  const GroupedMM& a = *args;
  std::unique_ptr<Expert[]> experts(new Expert[a.E]);
  i64 num_experts = 0, num_rows = 0, start = 0;
  for (i64 e = 0; e < a.E; e++) {
    const i64 end = a.offsets[e];
    if (end < start || end > a.R) return 1;
    if (end > start && end - start <= a.most_rows) {
      experts[num_experts++] = {e, start, end};
      num_rows += end - start;
    }
    start = end;
  }
  for (i64 r = 0; a.rows && r < start; r++)
    if (a.rows[r] < 0 || a.rows[r] >= a.N * a.top_k) return 1;
  with_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    using P = std::conditional_t<std::is_same_v<T, bf16>, BFloat16, Floats<T>>;
    memset((void*)((T*)a.y + start * a.G), 0, (a.R - start) * a.G * sizeof(T));
    if (!num_experts) return;
    if (a.stride_h == 1) run<P, true>(a, experts.get(), num_experts, num_rows);
    else run<P, false>(a, experts.get(), num_experts, num_rows);
  });
  return 0;
}
