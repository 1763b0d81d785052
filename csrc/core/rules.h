#pragma once
// Update rules: one functor each, (weight, estimate, state) -> (weight, state) in fp32, before rounding to storage.
// A functor is made once per tensor and pass from the scalars of the tensor's row; `kStates` says how many numbers per
// weight it keeps between steps. Scalars are derived in double and rounded once.
#include "core/lane.h"

namespace pyzo {

enum Rule : int { kSgd = 0, kSign = 1, kMomentum = 2, kAdam = 3, kRules };

PYZO_HD int states_of(int rule) { return rule == kMomentum ? 1 : rule == kAdam ? 2 : 0; }

// The scalars of a row that rules read.
struct Group {
  double lr, eps, weight_decay;
  double beta1;  // also: momentum
  double beta2, dampening, rule_eps;
  bool option;                      // Nesterov; decoupled decay
  int64_t age;                      // number of this update, 1 for the first
  double correction1, correction2;  // 1 - beta1^age, 1 - beta2^age
};

// g + wd w. The decay term is left out, not multiplied by zero, where wd is 0.
template <class L>
struct Decay {
  typename L::F factor;
  bool used;
  explicit PYZO_HD Decay(double weight_decay)
      : factor(L::splat(float(weight_decay))), used(float(weight_decay) != 0.0f) {}
  PYZO_HD typename L::F operator()(typename L::F w, typename L::F g) const { return used ? L::fma(factor, w, g) : g; }
};

// w <- w - lr (g + wd w).
template <class L>
struct Sgd {
  static constexpr int kStates = 0;
  typename L::F minus_lr;
  Decay<L> decay;
  explicit PYZO_HD Sgd(const Group& s) : minus_lr(L::splat(-float(s.lr))), decay(s.weight_decay) {}
  PYZO_HD typename L::F operator()(typename L::F w, typename L::F g, typename L::F*) const {
    return L::fma(minus_lr, decay(w, g), w);
  }
};

// w <- w - lr (sign(g) + wd w), elementwise (signSGD, arXiv 1802.04434; the decay stands beside the sign).
template <class L>
struct Sign {
  static constexpr int kStates = 0;
  typename L::F minus_lr;
  Decay<L> decay;
  explicit PYZO_HD Sign(const Group& s) : minus_lr(L::splat(-float(s.lr))), decay(s.weight_decay) {}
  PYZO_HD typename L::F operator()(typename L::F w, typename L::F g, typename L::F*) const {
    return L::fma(minus_lr, decay(w, L::positive_one(g) - L::positive_one(-g)), w);
  }
};

// b <- mu b + (1 - dampening) (g + wd w), undamped in the first update; w <- w - lr b, or with Nesterov
// w <- w - lr (g + wd w + mu b): torch.optim.SGD's.
template <class L>
struct Momentum {
  static constexpr int kStates = 1;
  typename L::F minus_lr, mu, mu_buffer, fresh;
  Decay<L> decay;
  bool nesterov;
  explicit PYZO_HD Momentum(const Group& s)
      : minus_lr(L::splat(-float(s.lr))),
        mu(L::splat(float(s.beta1))),
        mu_buffer(L::splat(s.age <= 1 ? 0.0f : float(s.beta1))),
        fresh(L::splat(s.age <= 1 ? 1.0f : float(1.0 - s.dampening))),
        decay(s.weight_decay),
        nesterov(s.option) {}
  PYZO_HD typename L::F operator()(typename L::F w, typename L::F g, typename L::F* state) const {
    g = decay(w, g);
    state[0] = L::fma(mu_buffer, state[0], fresh * g);
    return L::fma(minus_lr, nesterov ? L::fma(mu, state[0], g) : state[0], w);
  }
};

// Adam (arXiv 1412.6980, algorithm 1) with the decay inside g, or decoupled (AdamW, arXiv 1711.05101).
template <class L>
struct Adam {
  static constexpr int kStates = 2;
  typename L::F fresh1, beta2, fresh2, root, eps, minus_step, shrink;
  Decay<L> decay;
  bool decoupled;
  explicit PYZO_HD Adam(const Group& s)
      : fresh1(L::splat(float(1.0 - s.beta1))),
        beta2(L::splat(float(s.beta2))),
        fresh2(L::splat(float(1.0 - s.beta2))),
        root(L::splat(float(1.0 / Scalar::sqrt64(s.correction2)))),
        eps(L::splat(float(s.rule_eps))),
        minus_step(L::splat(float(-s.lr / s.correction1))),
        shrink(L::splat(float(-(s.lr * s.weight_decay)))),
        decay(s.weight_decay),
        decoupled(s.option) {}
  PYZO_HD typename L::F operator()(typename L::F w, typename L::F g, typename L::F* state) const {
    typename L::F from = w;
    if (!decoupled)
      g = decay(w, g);
    else if (decay.used)
      from = L::fma(shrink, w, w);
    state[0] = L::fma(fresh1, g - state[0], state[0]);
    state[1] = L::fma(beta2, state[1], (fresh2 * g) * g);
    return L::fma(minus_step, L::divide(state[0], L::fma(L::sqrt_any(state[1]), root, eps)), from);
  }
};

// The functor of a rule code.
template <class L, int kRule>
struct RuleOf;
template <class L>
struct RuleOf<L, kSgd> {
  using type = Sgd<L>;
};
template <class L>
struct RuleOf<L, kSign> {
  using type = Sign<L>;
};
template <class L>
struct RuleOf<L, kMomentum> {
  using type = Momentum<L>;
};
template <class L>
struct RuleOf<L, kAdam> {
  using type = Adam<L>;
};

}  // namespace pyzo
