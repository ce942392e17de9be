"""Slow float64 oracles, written from the pseudo-code of arXiv 2405.09637 and from its author's released code."""

from __future__ import annotations

import numpy as np


class ReferenceCLASSP:
    """Algorithm 1, one coordinate at a time, in float64.

    `threshold` may be a float or a function of the flat gradient (how `density` is checked).
    """

    def __init__(self, w, lr, threshold=0.0, power=2.0, eps=1e-6, apply_decay=True, weight_decay=0.0, maximize=False):
        self.w = np.array(w, dtype=np.float64)
        self.s = np.zeros_like(self.w)
        self.lr, self.threshold, self.power, self.eps = lr, threshold, power, eps
        self.apply_decay, self.weight_decay, self.maximize = apply_decay, weight_decay, maximize

    def step(self, gradient):
        gradient = np.asarray(gradient, dtype=np.float64)
        threshold = self.threshold(gradient) if callable(self.threshold) else self.threshold
        for i in np.ndindex(self.w.shape):
            g = -gradient[i] if self.maximize else gradient[i]
            self.w[i] -= self.lr * self.weight_decay * self.w[i]
            if not g**2 > threshold:
                continue
            self.s[i] += abs(g) ** self.power
            scale = (self.eps + self.s[i]) ** (1 / self.power) if self.apply_decay else 1.0
            self.w[i] -= self.lr * g / scale


class ReleasedCLASSP:
    """What the released code does, where it parts from Algorithm 1.

    The gate is one Boolean for the whole tensor, `(grad ** 2).any() > threshold`: any nonzero gradient opens it for
    every threshold below 1. The accumulator is the sum of |g| whatever the power, as `add_(...) ** power` discards the
    power. (The leak of the first group's hyperparameters into the others is tested on `CLASSP` itself.)
    """

    def __init__(self, w, lr, threshold=0.0, power=1.0, eps=1e-8, apply_decay=True):
        self.w = np.array(w, dtype=np.float64)
        self.s = np.zeros_like(self.w)
        self.lr, self.threshold, self.power, self.eps, self.apply_decay = lr, threshold, power, eps, apply_decay

    def step(self, gradient):
        g = np.asarray(gradient, dtype=np.float64)
        if not float((g**2).any()) > self.threshold:
            return
        self.s += np.abs(g)
        scale = (self.eps + self.s) ** (1 / self.power) if self.apply_decay else 1.0
        self.w -= self.lr * g / scale
