// Training kernels for one CPU core with AVX-512: every intermediate of a block of tokens stays in L2.
// All tensors are contiguous float32. See model.py for the shape suffixes. Built by kernels.py, called through ctypes.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using Vec = __m512;
constexpr int W = 16;       // floats in a vector
constexpr long DEPTH = 96;  // rows of a right-hand side that stay in L1 while a gradient is accumulated
constexpr int BLOCK = 96;   // routed rows that go through an expert together

inline Vec exp_vec(Vec x) {
  // 2^n * p(r), r in [-ln2/2, ln2/2]; relative error below 2e-7.
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(88.f)), _mm512_set1_ps(-87.f));
  const Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Vec p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
  return _mm512_scalef_ps(p, n);
}

// C[i, :J*16] (+)= sum_k A[i * ai + k * ak] * B[k * ldb, :J*16] for I rows.
template <int I, int J>
inline void tile(const float* a, long ai, long ak, const float* b, long ldb, float* c, long ldc, long K, bool add) {
  Vec acc[I][J];
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) acc[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * W) : _mm512_setzero_ps();
  for (long k = 0; k < K; ++k) {
    Vec row[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) row[j] = _mm512_loadu_ps(b + k * ldb + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
      const Vec s = _mm512_set1_ps(a[i * ai + k * ak]);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) acc[i][j] = _mm512_fmadd_ps(s, row[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) _mm512_storeu_ps(c + i * ldc + j * W, acc[i][j]);
}

template <int I, int J>
inline void panel(const float* a, long ai, long ak, const float* b, long ldb, float* c, long ldc, long M, long K, bool add) {
  long i = 0;
  for (; i + I <= M; i += I) tile<I, J>(a + i * ai, ai, ak, b, ldb, c + i * ldc, ldc, K, add);
  if constexpr (I > 4)
    for (; i + 4 <= M; i += 4) tile<4, J>(a + i * ai, ai, ak, b, ldb, c + i * ldc, ldc, K, add);
  for (; i < M; ++i) tile<1, J>(a + i * ai, ai, ak, b, ldb, c + i * ldc, ldc, K, add);
}

// C[M, N] (+)= A B with A[i, k] at a[i * ai + k * ak] and B[k, :] contiguous; N a multiple of 16.
void matmul(const float* a, long ai, long ak, const float* b, long ldb, float* c, long ldc, long M, long N, long K, bool add) {
  for (; add && K > DEPTH; K -= DEPTH, a += DEPTH * ak, b += DEPTH * ldb) matmul(a, ai, ak, b, ldb, c, ldc, M, N, DEPTH, true);
  while (N > 0) {
    const long n = N >= 96 && N % 96 == 0 ? 96 : N >= 64 ? 64 : N;
    switch (n) {
      case 96: panel<4, 6>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      case 80: panel<5, 5>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      case 64: panel<6, 4>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      case 48: panel<8, 3>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      case 32: panel<12, 2>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      case 16: panel<14, 1>(a, ai, ak, b, ldb, c, ldc, M, K, add); break;
      default: std::abort();  // kernels.py checks that widths are multiples of 16
    }
    b += n, c += n, N -= n;
  }
}

void transpose(const float* from, long rows, long columns, float* to) {
  for (long c = 0; c < columns; ++c)
    for (long r = 0; r < rows; ++r) to[c * rows + r] = from[r * columns + c];
}

inline void copy_row(float* to, const float* from, long n) {
  for (long j = 0; j < n; j += W) _mm512_storeu_ps(to + j, _mm512_loadu_ps(from + j));
}

inline void add_row(float* to, const float* from, long n) {
  for (long j = 0; j < n; j += W) _mm512_storeu_ps(to + j, _mm512_add_ps(_mm512_loadu_ps(to + j), _mm512_loadu_ps(from + j)));
}

inline Vec sigmoid(Vec x) {
  const Vec one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp_vec(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Routed rows (token * K + choice) sorted by expert; ends[e] is the end of expert e's rows.
void sort_by_expert(const int64_t* ids, long R, long E, std::vector<int>& order, std::vector<int>& ends) {
  std::vector<int> next(E + 1, 0);
  for (long r = 0; r < R; ++r) ++next[ids[r] + 1];
  for (long e = 0; e < E; ++e) next[e + 1] += next[e];
  ends.assign(next.begin() + 1, next.end());
  order.resize(R);
  for (long r = 0; r < R; ++r) order[next[ids[r]]++] = static_cast<int>(r);
}

float dot(const float* a, const float* b, long n) {
  Vec total = _mm512_setzero_ps();
  for (long j = 0; j < n; j += W) total = _mm512_fmadd_ps(_mm512_loadu_ps(a + j), _mm512_loadu_ps(b + j), total);
  return _mm512_reduce_add_ps(total);
}

// The first position of the largest of n floats.
inline long argmax(const float* x, long n) {
  Vec most = _mm512_loadu_ps(x);
  for (long j = W; j < n; j += W) most = _mm512_max_ps(most, _mm512_loadu_ps(x + j));
  const Vec maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (long j = 0; j < n; j += W)
    if (const __mmask16 hit = _mm512_cmp_ps_mask(_mm512_loadu_ps(x + j), maximum, _CMP_EQ_OQ)) return j + __builtin_ctz(hit);
  return 0;  // only with NaN
}

// y = x / rms(x) * w, for rows of n floats.
inline void norm_row(const float* x, const float* w, float* y, long n, float eps) {
  const Vec r = _mm512_set1_ps(1.f / std::sqrt(dot(x, x, n) / n + eps));
  for (long j = 0; j < n; j += W) _mm512_storeu_ps(y + j, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + j), r), _mm512_loadu_ps(w + j)));
}

// dx += the gradient of norm_row, dw += the weight's.
inline void norm_row_backward(const float* x, const float* w, const float* dy, float* dx, float* dw, long n, float eps) {
  const float r = 1.f / std::sqrt(dot(x, x, n) / n + eps);
  const Vec vr = _mm512_set1_ps(r);
  Vec total = _mm512_setzero_ps();
  for (long j = 0; j < n; j += W) {
    const Vec vx = _mm512_loadu_ps(x + j), g = _mm512_loadu_ps(dy + j);
    _mm512_storeu_ps(dw + j, _mm512_fmadd_ps(g, _mm512_mul_ps(vx, vr), _mm512_loadu_ps(dw + j)));
    total = _mm512_fmadd_ps(_mm512_mul_ps(g, _mm512_loadu_ps(w + j)), vx, total);
  }
  const Vec slope = _mm512_set1_ps(-r * r * r / n * _mm512_reduce_add_ps(total));
  for (long j = 0; j < n; j += W) {
    const Vec direct = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(dy + j), _mm512_loadu_ps(w + j)), vr);
    _mm512_storeu_ps(dx + j, _mm512_add_ps(_mm512_loadu_ps(dx + j), _mm512_fmadd_ps(_mm512_loadu_ps(x + j), slope, direct)));
  }
}

// One head of one token: normalise, rotate by position, scale. H is the head width.
inline void rotate_head(const float* x, const float* w, const float* cos, const float* sin, float scale, float* y, long H, float eps) {
  float normed[256];
  norm_row(x, w, normed, H, eps);
  for (long j = 0; j < H / 2; ++j) {
    y[j] = (normed[j] * cos[j] - normed[j + H / 2] * sin[j]) * scale;
    y[j + H / 2] = (normed[j + H / 2] * cos[j + H / 2] + normed[j] * sin[j + H / 2]) * scale;
  }
}

inline void rotate_head_backward(const float* x, const float* w, const float* cos, const float* sin, float scale, const float* dy,
                                 float* dx, float* dw, long H, float eps) {
  float turned[256];
  for (long j = 0; j < H / 2; ++j) {
    turned[j] = (dy[j] * cos[j] + dy[j + H / 2] * sin[j + H / 2]) * scale;
    turned[j + H / 2] = (dy[j + H / 2] * cos[j + H / 2] - dy[j] * sin[j]) * scale;
  }
  norm_row_backward(x, w, turned, dx, dw, H, eps);
}

constexpr long QUERIES = 32;  // query rows that attend together

// weights[i, :end] = exp(q k^T) for QUERIES rows from `begin`, zero where a key lies in the future. Queries and keys
// are normalised, so no maximum is subtracted.
void attention_weights(const float* q, const float* k_t, long begin, long S, long H, float* weights, float* total) {
  const long end = begin + QUERIES;
  matmul(q + begin * H, H, 1, k_t, S, weights, S, QUERIES, end, H, false);
  for (long i = 0; i < QUERIES; ++i) {
    Vec sum = _mm512_setzero_ps();
    for (long j = 0; j < end; j += W) {
      const long seen = begin + i + 1 - j;
      const __mmask16 mask = seen >= W ? 0xffff : seen <= 0 ? 0 : (1 << seen) - 1;
      const Vec e = _mm512_maskz_mov_ps(mask, exp_vec(_mm512_loadu_ps(weights + i * S + j)));
      _mm512_storeu_ps(weights + i * S + j, e);
      sum = _mm512_add_ps(sum, e);
    }
    total[i] = _mm512_reduce_add_ps(sum);
  }
}

// Rotated queries (N, S, H), keys (S, H) and values (S, H) of one sequence from its raw projections (S, (N + 2) H).
void unpack(const float* qkv, const float* q_norm, const float* k_norm, const float* cos, const float* sin, float* q, float* k,
            float* v, long S, long N, long H, float eps) {
  const long width = (N + 2) * H;
  const float scale = 1.f / std::sqrt(static_cast<float>(H));
  for (long s = 0; s < S; ++s) {
    for (long n = 0; n < N; ++n) rotate_head(qkv + s * width + n * H, q_norm, cos + s * H, sin + s * H, scale, q + (n * S + s) * H, H, eps);
    rotate_head(qkv + s * width + N * H, k_norm, cos + s * H, sin + s * H, 1.f, k + s * H, H, eps);
    copy_row(v + s * H, qkv + s * width + (N + 1) * H, H);
  }
}

}  // namespace

// Adds the chosen experts' weighted outputs to out (T, D); pre (R, 2F) keeps the pre-activations in expert order.
extern "C" void experts_forward(float* out, const float* x, const float* weight, const int64_t* ids, const float* gu,
                                const float* dn, float* pre, long T, long K, long E, long D, long F) {
  const long F2 = 2 * F;
  std::vector<int> order, ends;
  sort_by_expert(ids, T * K, E, order, ends);
  std::vector<float> gu_t(D * F2), dn_t(F * D), xs(BLOCK * D), h(BLOCK * F), y(BLOCK * D);
  for (long e = 0, a = 0; e < E; a = ends[e++]) {
    if (a == ends[e]) continue;
    transpose(gu + e * F2 * D, F2, D, gu_t.data());
    transpose(dn + e * D * F, D, F, dn_t.data());
    for (long r = a; r < ends[e]; r += BLOCK) {
      const long n = std::min<long>(BLOCK, ends[e] - r);
      for (long i = 0; i < n; ++i) copy_row(&xs[i * D], x + order[r + i] / K * D, D);
      matmul(xs.data(), D, 1, gu_t.data(), F2, pre + r * F2, F2, n, F2, D, false);
      for (long i = 0; i < n; ++i) {
        const float* p = pre + (r + i) * F2;
        const Vec w = _mm512_set1_ps(weight[order[r + i]]);
        for (long j = 0; j < F; j += W) {
          const Vec g = _mm512_loadu_ps(p + j), u = _mm512_loadu_ps(p + F + j);
          _mm512_storeu_ps(&h[i * F + j], _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), _mm512_mul_ps(u, w)));
        }
      }
      matmul(h.data(), F, 1, dn_t.data(), D, y.data(), D, n, D, F, false);
      for (long i = 0; i < n; ++i) add_row(out + order[r + i] / K * D, &y[i * D], D);
    }
  }
}

// Adds to grad_x, gu_grad and dn_grad; writes grad_w (T, K).
extern "C" void experts_backward(const float* grad, const float* x, const float* weight, const int64_t* ids,
                                 const float* pre, const float* gu, const float* dn, float* gu_grad, float* dn_grad,
                                 float* grad_x, float* grad_w, long T, long K, long E, long D, long F) {
  const long F2 = 2 * F;
  std::vector<int> order, ends;
  sort_by_expert(ids, T * K, E, order, ends);
  std::vector<float> dy(BLOCK * D), xs(BLOCK * D), dh(BLOCK * F), h(BLOCK * F), dp(BLOCK * F2), dx(BLOCK * D);
  const Vec one = _mm512_set1_ps(1.f);
  for (long e = 0, a = 0; e < E; a = ends[e++]) {
    for (long r = a; r < ends[e]; r += BLOCK) {
      const long n = std::min<long>(BLOCK, ends[e] - r);
      for (long i = 0; i < n; ++i) {
        copy_row(&dy[i * D], grad + order[r + i] / K * D, D);
        copy_row(&xs[i * D], x + order[r + i] / K * D, D);
      }
      matmul(dy.data(), D, 1, dn + e * D * F, F, dh.data(), F, n, F, D, false);
      for (long i = 0; i < n; ++i) {
        const float* p = pre + (r + i) * F2;
        const Vec w = _mm512_set1_ps(weight[order[r + i]]);
        Vec total = _mm512_setzero_ps();
        for (long j = 0; j < F; j += W) {
          const Vec g = _mm512_loadu_ps(p + j), u = _mm512_loadu_ps(p + F + j), d = _mm512_loadu_ps(&dh[i * F + j]);
          const Vec s = sigmoid(g), silu = _mm512_mul_ps(g, s), plain = _mm512_mul_ps(silu, u), dw = _mm512_mul_ps(d, w);
          total = _mm512_fmadd_ps(d, plain, total);
          _mm512_storeu_ps(&h[i * F + j], _mm512_mul_ps(plain, w));
          const Vec slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
          _mm512_storeu_ps(&dp[i * F2 + j], _mm512_mul_ps(_mm512_mul_ps(dw, u), slope));
          _mm512_storeu_ps(&dp[i * F2 + F + j], _mm512_mul_ps(dw, silu));
        }
        grad_w[order[r + i]] = _mm512_reduce_add_ps(total);
      }
      matmul(dy.data(), 1, D, h.data(), F, dn_grad + e * D * F, F, D, F, n, true);
      matmul(dp.data(), 1, F2, xs.data(), D, gu_grad + e * F2 * D, D, F2, D, n, true);
      matmul(dp.data(), F2, 1, gu + e * F2 * D, D, dx.data(), D, n, D, F2, false);
      for (long i = 0; i < n; ++i) add_row(grad_x + order[r + i] / K * D, &dx[i * D], D);
    }
  }
}


// A layer up to its experts, for B sequences of S tokens: out and next both get the residual stream after attention.
extern "C" void attention_forward(const float* hidden, const float* norm1, const float* w_qkv, const float* q_norm, const float* k_norm,
                                  const float* w_out, const float* norm2, const float* w_router, const float* cos, const float* sin,
                                  float* qkv, float* mixed, float* out, float* next, float* normed, float* probs, float* weights,
                                  int64_t* ids, long B, long S, long D, long N, long H, long E, long K, float eps) {
  const long width = (N + 2) * H, Q = N * H;
  std::vector<float> qkv_t(D * width), out_t(Q * D), router_t(D * E), x(S * D), q(Q * S), k(S * H), k_t(H * S), v(S * H), a(QUERIES * S), total(QUERIES);
  transpose(w_qkv, width, D, qkv_t.data());
  transpose(w_out, D, Q, out_t.data());
  transpose(w_router, E, D, router_t.data());
  for (long t = 0; t < B * S; t += S) {
    for (long s = 0; s < S; ++s) norm_row(hidden + (t + s) * D, norm1, &x[s * D], D, eps);
    matmul(x.data(), D, 1, qkv_t.data(), width, qkv + t * width, width, S, width, D, false);
    unpack(qkv + t * width, q_norm, k_norm, cos, sin, q.data(), k.data(), v.data(), S, N, H, eps);
    transpose(k.data(), S, H, k_t.data());
    for (long n = 0; n < N; ++n)
      for (long begin = 0; begin < S; begin += QUERIES) {
        attention_weights(&q[n * S * H], k_t.data(), begin, S, H, a.data(), total.data());
        float* o = mixed + (t + begin) * Q + n * H;
        matmul(a.data(), S, 1, v.data(), H, o, Q, QUERIES, H, begin + QUERIES, false);
        for (long i = 0; i < QUERIES; ++i)
          for (long j = 0; j < H; j += W) _mm512_storeu_ps(o + i * Q + j, _mm512_div_ps(_mm512_loadu_ps(o + i * Q + j), _mm512_set1_ps(total[i])));
      }
    std::memcpy(out + t * D, hidden + t * D, S * D * sizeof(float));
    matmul(mixed + t * Q, Q, 1, out_t.data(), D, out + t * D, D, S, D, Q, true);
    std::memcpy(next + t * D, out + t * D, S * D * sizeof(float));
    for (long s = 0; s < S; ++s) norm_row(out + (t + s) * D, norm2, normed + (t + s) * D, D, eps);
    matmul(normed + t * D, D, 1, router_t.data(), E, probs + t * E, E, S, E, D, false);
    for (long s = t; s < t + S; ++s) {
      float* p = probs + s * E;
      float left[1024];
      const float maximum = p[argmax(p, E)];
      Vec sum = _mm512_setzero_ps();
      for (long j = 0; j < E; j += W) {
        const Vec e = exp_vec(_mm512_sub_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(maximum)));
        _mm512_storeu_ps(p + j, e);
        sum = _mm512_add_ps(sum, e);
      }
      const float scale = 1.f / _mm512_reduce_add_ps(sum);
      for (long j = 0; j < E; j += W) {
        const Vec value = _mm512_mul_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(scale));
        _mm512_storeu_ps(p + j, value);
        _mm512_storeu_ps(left + j, value);
      }
      for (long c = 0; c < K; ++c) {
        const long best = argmax(left, E);
        ids[s * K + c] = best;
        weights[s * K + c] = left[best];
        left[best] = -1.f;
      }
    }
  }
}

// The gradient of attention_forward. push (E) is the balancing loss's gradient with respect to every token's probabilities.
extern "C" void attention_backward(const float* hidden, const float* norm1, const float* w_qkv, const float* q_norm, const float* k_norm,
                                   const float* w_out, const float* norm2, const float* w_router, const float* cos, const float* sin,
                                   const float* qkv, const float* mixed, const float* out, const float* normed, const float* probs,
                                   const int64_t* ids, const float* push, const float* grad_out, const float* grad_normed,
                                   const float* grad_weights, float* d_norm1, float* d_w_qkv, float* d_q_norm, float* d_k_norm,
                                   float* d_w_out, float* d_norm2, float* d_w_router, float* grad_hidden,
                                   long B, long S, long D, long N, long H, long E, long K, float eps) {
  const long width = (N + 2) * H, Q = N * H;
  const float scale = 1.f / std::sqrt(static_cast<float>(H));
  std::vector<float> x(S * D), q(Q * S), k(S * H), k_t(H * S), v(S * H), v_t(H * S), a(QUERIES * S), da(QUERIES * S), total(QUERIES);
  std::vector<float> d_logits(S * E), d_x(S * D), d_mixed(S * Q), d_o(QUERIES * H), d_q(Q * S), d_k(S * H), d_v(S * H), d_qkv(S * width);
  for (long t = 0; t < B * S; t += S) {
    for (long s = 0; s < S; ++s) {
      const float* p = probs + (t + s) * E;
      float* d = &d_logits[s * E];
      std::copy(push, push + E, d);
      for (long c = 0; c < K; ++c) d[ids[(t + s) * K + c]] += grad_weights[(t + s) * K + c];
      const Vec mean = _mm512_set1_ps(dot(d, p, E));
      for (long j = 0; j < E; j += W) _mm512_storeu_ps(d + j, _mm512_mul_ps(_mm512_loadu_ps(p + j), _mm512_sub_ps(_mm512_loadu_ps(d + j), mean)));
    }
    matmul(d_logits.data(), 1, E, normed + t * D, D, d_w_router, D, E, D, S, true);
    std::memcpy(d_x.data(), grad_normed + t * D, S * D * sizeof(float));
    matmul(d_logits.data(), E, 1, w_router, D, d_x.data(), D, S, D, E, true);
    float* g = grad_hidden + t * D;
    std::memcpy(g, grad_out + t * D, S * D * sizeof(float));
    for (long s = 0; s < S; ++s) norm_row_backward(out + (t + s) * D, norm2, &d_x[s * D], g + s * D, d_norm2, D, eps);
    matmul(g, D, 1, w_out, Q, d_mixed.data(), Q, S, Q, D, false);
    matmul(g, 1, D, mixed + t * Q, Q, d_w_out, Q, D, Q, S, true);
    unpack(qkv + t * width, q_norm, k_norm, cos, sin, q.data(), k.data(), v.data(), S, N, H, eps);
    transpose(k.data(), S, H, k_t.data());
    transpose(v.data(), S, H, v_t.data());
    std::fill(d_k.begin(), d_k.end(), 0.f);
    std::fill(d_v.begin(), d_v.end(), 0.f);
    for (long n = 0; n < N; ++n)
      for (long begin = 0; begin < S; begin += QUERIES) {
        const long end = begin + QUERIES;
        attention_weights(&q[n * S * H], k_t.data(), begin, S, H, a.data(), total.data());
        for (long i = 0; i < QUERIES; ++i) {
          const float inverse = 1.f / total[i];
          for (long j = 0; j < H; ++j) d_o[i * H + j] = d_mixed[(begin + i) * Q + n * H + j] * inverse;
        }
        matmul(d_o.data(), H, 1, v_t.data(), S, da.data(), S, QUERIES, end, H, false);
        matmul(a.data(), 1, S, d_o.data(), H, d_v.data(), H, end, H, QUERIES, true);
        for (long i = 0; i < QUERIES; ++i) {
          const Vec mean = _mm512_set1_ps(dot(&d_o[i * H], mixed + (t + begin + i) * Q + n * H, H));
          for (long j = i * S; j < i * S + end; j += W) _mm512_storeu_ps(&da[j], _mm512_mul_ps(_mm512_loadu_ps(&a[j]), _mm512_sub_ps(_mm512_loadu_ps(&da[j]), mean)));
        }
        matmul(da.data(), S, 1, k.data(), H, &d_q[(n * S + begin) * H], H, QUERIES, H, end, false);
        matmul(da.data(), 1, S, &q[(n * S + begin) * H], H, d_k.data(), H, end, H, QUERIES, true);
      }
    std::fill(d_qkv.begin(), d_qkv.end(), 0.f);
    for (long s = 0; s < S; ++s) {
      const float* raw = qkv + (t + s) * width;
      float* d = &d_qkv[s * width];
      for (long n = 0; n < N; ++n)
        rotate_head_backward(raw + n * H, q_norm, cos + s * H, sin + s * H, scale, &d_q[(n * S + s) * H], d + n * H, d_q_norm, H, eps);
      rotate_head_backward(raw + N * H, k_norm, cos + s * H, sin + s * H, 1.f, &d_k[s * H], d + N * H, d_k_norm, H, eps);
      copy_row(d + (N + 1) * H, &d_v[s * H], H);
    }
    for (long s = 0; s < S; ++s) norm_row(hidden + (t + s) * D, norm1, &x[s * D], D, eps);
    matmul(d_qkv.data(), 1, width, x.data(), D, d_w_qkv, D, width, D, S, true);
    matmul(d_qkv.data(), width, 1, w_qkv, D, d_x.data(), D, S, D, width, false);
    for (long s = 0; s < S; ++s) norm_row_backward(hidden + (t + s) * D, norm1, &d_x[s * D], g + s * D, d_norm1, D, eps);
  }
}

constexpr long ROWS = 256;   // tokens whose logits are in cache together
constexpr long WORDS = 64;   // vocabulary entries in a panel

// Summed cross-entropy of T tokens into loss[0]; grad_hidden and the gradients of scale * loss are made at once.
// Logits come from normalised states and stay far below 88, where exp overflows.
extern "C" void head(const float* hidden, const float* norm, const float* embed, const int64_t* targets, float* loss, float* grad_hidden,
                     float* d_norm, float* d_embed, long T, long D, long V, float scale, float eps) {
  std::vector<float> packed(V * D), e(ROWS * V), x(ROWS * D), xi(ROWS * D), dx(ROWS * D), total(ROWS);
  for (long p = 0; p < V; p += WORDS) transpose(embed + p * D, WORDS, D, &packed[p * D]);
  double sum = 0;
  for (long t = 0; t < T; t += ROWS) {
    const long n = std::min(ROWS, T - t);
    for (long i = 0; i < n; ++i) norm_row(hidden + (t + i) * D, norm, &x[i * D], D, eps);
    std::fill(total.begin(), total.end(), 0.f);
    for (long p = 0; p < V; p += WORDS) {
      float* panel_e = &e[p * ROWS];
      matmul(x.data(), D, 1, &packed[p * D], WORDS, panel_e, WORDS, n, WORDS, D, false);
      for (long i = 0; i < n; ++i) {
        Vec s = _mm512_setzero_ps();
        for (long j = i * WORDS; j < (i + 1) * WORDS; j += W) {
          const Vec value = exp_vec(_mm512_loadu_ps(panel_e + j));
          _mm512_storeu_ps(panel_e + j, value);
          s = _mm512_add_ps(s, value);
        }
        total[i] += _mm512_reduce_add_ps(s);
      }
    }
    for (long i = 0; i < n; ++i) {
      sum += std::log(total[i]) - dot(&x[i * D], embed + targets[t + i] * D, D);
      for (long j = 0; j < D; ++j) xi[i * D + j] = x[i * D + j] * (scale / total[i]);
    }
    std::fill(dx.begin(), dx.end(), 0.f);
    for (long p = 0; p < V; p += WORDS) {
      matmul(&e[p * ROWS], WORDS, 1, embed + p * D, D, dx.data(), D, n, D, WORDS, true);
      matmul(&e[p * ROWS], 1, WORDS, xi.data(), D, d_embed + p * D, D, WORDS, D, n, true);
    }
    for (long i = 0; i < n; ++i) {
      const float* word = embed + targets[t + i] * D;
      float* d_word = d_embed + targets[t + i] * D;
      float* g = grad_hidden + (t + i) * D;
      for (long j = 0; j < D; ++j) dx[i * D + j] = dx[i * D + j] * (scale / total[i]) - scale * word[j];
      for (long j = 0; j < D; ++j) d_word[j] -= scale * x[i * D + j];
      std::fill(g, g + D, 0.f);
      norm_row_backward(hidden + (t + i) * D, norm, &dx[i * D], g, d_norm, D, eps);
    }
  }
  loss[0] = static_cast<float>(sum);
}
