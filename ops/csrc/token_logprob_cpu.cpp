// CPU kernels of igrpo::token_logprob and its backward. One pass over a row forward (online softmax in chunks that stay
// in L1), one backward. ops/token_logprob.py declares the ops, their plain-torch reference, fake and autograd.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>

namespace {

using at::Tensor;

constexpr int64_t kChunk = 2048;
constexpr double kLowest = -1e4;  // stands for -inf: its exp is 0, and 0 * kLowest is 0 where 0 * inf is not a number

// exp of x <= 0 as one polynomial (Cephes), which vectorises; about 1 ulp; 0 below -87.
inline float exp_nonpositive(float x) {
  const float keep = x < -87.f ? 0.f : 1.f;
  x = x < -87.f ? -87.f : x;
  const float n = std::nearbyintf(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return keep * p * scale;
}
inline double exp_nonpositive(double x) { return std::exp(x); }

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <typename T, typename A>
void forward_row(const T* x, int64_t vocab, int64_t target, A inverse_temperature, A* logp, A* entropy, A* lse) {
  A scaled[kChunk];
  A top = -INFINITY, sum = 0, weighted = 0;  // sum of e^(y-top), and of e^(y-top) * (y-top)
  for (int64_t start = 0; start < vocab; start += kChunk) {
    const int64_t n = std::min(kChunk, vocab - start);
    A chunk_top = -INFINITY;
#pragma omp simd reduction(max : chunk_top)
    for (int64_t j = 0; j < n; ++j) {
      const A y = static_cast<A>(x[start + j]) * inverse_temperature;
      scaled[j] = y;
      chunk_top = y > chunk_top ? y : chunk_top;
    }
    if (chunk_top == -INFINITY) continue;
    if (chunk_top > top) {
      if (sum > 0) {
        const A shift = top - chunk_top, factor = std::exp(shift);
        weighted = factor * (weighted + sum * shift);
        sum *= factor;
      }
      top = chunk_top;
    }
    A chunk_sum = 0, chunk_weighted = 0;
#pragma omp simd reduction(+ : chunk_sum, chunk_weighted)
    for (int64_t j = 0; j < n; ++j) {
      A d = scaled[j] - top;
      d = d < static_cast<A>(kLowest) ? static_cast<A>(kLowest) : d;
      const A e = exp_nonpositive(d);
      chunk_sum += e;
      chunk_weighted += e * d;
    }
    sum += chunk_sum;
    weighted += chunk_weighted;
  }
  const A log_sum = std::log(sum);
  *lse = top + log_sum;
  *entropy = log_sum - weighted / sum;
  *logp = static_cast<A>(x[target]) * inverse_temperature - *lse;
}

// d/dx_j = (1/temperature) * (g_logp * (1[j = target] - p_j) - g_entropy * p_j * (log p_j + entropy))
template <typename T, typename A>
void backward_row(const T* x, int64_t vocab, int64_t target, A inverse_temperature, A g_logp, A g_entropy, A lse,
                  A entropy, T* grad) {
  const A g = g_logp * inverse_temperature, h = g_entropy * inverse_temperature;
  const auto negative = [&](int64_t j) {
    A z = static_cast<A>(x[j]) * inverse_temperature - lse;
    z = z < static_cast<A>(kLowest) ? static_cast<A>(kLowest) : z;
    z = z > 0 ? static_cast<A>(0) : z;
    return exp_nonpositive(z) * (g + h * (z + entropy));
  };
#pragma omp simd
  for (int64_t j = 0; j < vocab; ++j) grad[j] = static_cast<T>(-negative(j));
  grad[target] = static_cast<T>(g - negative(target));
}

void check(const Tensor& logits, const Tensor& target, const Tensor& temperature) {
  TORCH_CHECK_VALUE(logits.dim() == 2, "logits must be [T, V]");
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0), "targets must be [T]");
  TORCH_CHECK_VALUE(temperature.dim() == 1 && temperature.size(0) == logits.size(0), "temperature must be [T]");
  TORCH_CHECK_VALUE(target.scalar_type() == at::kLong, "targets must be int64");
}

at::ScalarType accumulate_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& logits, const Tensor& target, const Tensor& temperature) {
  check(logits, target, temperature);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  const auto options = logits.options().dtype(accumulate_type(logits));
  Tensor logp = at::empty({rows}, options), entropy = at::empty({rows}, options), lse = at::empty({rows}, options);
  if (rows == 0) return {logp, entropy, lse};
  TORCH_CHECK_INDEX(target.min().item<int64_t>() >= 0 && target.max().item<int64_t>() < vocab,
                    "a target lies outside of the vocabulary of ", vocab);
  const Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const Tensor t = target.contiguous(), inverse = temperature.to(options.dtype()).reciprocal().contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "token_logprob", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const scalar_t* data = x.const_data_ptr<scalar_t>();
    const int64_t* targets = t.const_data_ptr<int64_t>();
    const A* inverses = inverse.const_data_ptr<A>();
    A *lp = logp.mutable_data_ptr<A>(), *en = entropy.mutable_data_ptr<A>(), *ls = lse.mutable_data_ptr<A>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        forward_row<scalar_t, A>(data + r * x.stride(0), vocab, targets[r], inverses[r], lp + r, en + r, ls + r);
    });
  });
  return {logp, entropy, lse};
}

Tensor backward(const Tensor& g_logp, const Tensor& g_entropy, const Tensor& logits, const Tensor& target,
                const Tensor& temperature, const Tensor& lse, const Tensor& entropy) {
  check(logits, target, temperature);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  Tensor grad = at::empty({rows, vocab}, logits.options());
  if (rows == 0) return grad;
  const auto type = accumulate_type(logits);
  const Tensor x = logits.stride(1) == 1 ? logits : logits.contiguous();
  const Tensor t = target.contiguous(), inverse = temperature.to(type).reciprocal().contiguous();
  const Tensor g = g_logp.to(type).contiguous(), h = g_entropy.to(type).contiguous();
  const Tensor l = lse.contiguous(), e = entropy.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, x.scalar_type(), "token_logprob_backward", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const scalar_t* data = x.const_data_ptr<scalar_t>();
    scalar_t* out = grad.mutable_data_ptr<scalar_t>();
    const int64_t* targets = t.const_data_ptr<int64_t>();
    const A *inverses = inverse.const_data_ptr<A>(), *gs = g.const_data_ptr<A>(), *hs = h.const_data_ptr<A>();
    const A *lses = l.const_data_ptr<A>(), *entropies = e.const_data_ptr<A>();
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        backward_row<scalar_t, A>(data + r * x.stride(0), vocab, targets[r], inverses[r], gs[r], hs[r], lses[r],
                                  entropies[r], out + r * vocab);
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(igrpo, CPU, m) {
  m.impl("token_logprob", forward);
  m.impl("token_logprob_backward", backward);
}
