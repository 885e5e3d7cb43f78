"""A temperature for the logits, so that a model is right as often as its probabilities say."""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax
from transformers import PreTrainedConfig

from vit_finetune.evaluation.metrics import calibration_bins, expected_calibration_error, log_loss
from vit_finetune.model.loading import MULTI_LABEL
from vit_finetune.run import CALIBRATION_KEY, Calibrated, RunError

LOWEST, HIGHEST = 0.1, 10.0
"""Temperatures beyond are no calibration: the images that want them tell too little, or the model does."""


def fit_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """The temperature T of least log loss of softmax(logits / T), between 0.1 and 10 (Guo et al., 2017).

    The mean log loss is convex in β = 1 / T, so its slope in β, mean(Σ_c p_c z_c - z_y), rises and has one
    root. Without one in between, T is the end that the loss falls to: 0.1 where the images are all predicted
    rightly, and being surer still would never be punished. Logits that are all alike, or so far apart that
    the log loss is 0 at any T, have no slope: T is 1.

    Args:
        labels: true class ids, int `(images,)`.
        logits: float `(images, classes)`.
    """
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    own = z[np.arange(len(labels)), labels]

    def slope(beta: float) -> float:
        return float(((softmax(beta * z, axis=1) * z).sum(axis=1) - own).mean())

    coolest, hottest = slope(1 / LOWEST), slope(1 / HIGHEST)
    if coolest == hottest == 0:
        return 1.0
    if coolest <= 0:
        return LOWEST
    if hottest >= 0:
        return HIGHEST
    return float(1 / brentq(slope, 1 / HIGHEST, 1 / LOWEST, xtol=1e-12, rtol=1e-14))


def temper(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), float64 `(images, classes)`; which class is most probable stays."""
    probabilities: np.ndarray = softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    return probabilities


def measure_calibrated(labels: np.ndarray, logits: np.ndarray, temperature: float) -> Calibrated:
    """Log loss and calibration of logits that are divided by a temperature.

    Args:
        labels: true class ids, int `(images,)`.
        logits: float `(images, classes)`.
        temperature: above 0.
    """
    probabilities = temper(logits, temperature)
    bins = calibration_bins(labels, probabilities)
    return Calibrated(
        temperature=temperature,
        log_loss=log_loss(labels, probabilities),
        ece=expected_calibration_error(bins),
        calibration=bins,
    )


def temperature_of(config: PreTrainedConfig, where: str) -> float:
    """The temperature that a model's config.json holds.

    Args:
        config: the model's.
        where: it lies, for the message.

    Raises:
        RunError: it holds none, or none that is a number above 0; or its images may have several labels.
    """
    if config.problem_type == MULTI_LABEL:
        raise RunError(
            f"{where}: the model gives each of several labels a probability of its own, and a temperature is "
            f"for models of one class per image. Leave out --calibrated"
        )
    found = getattr(config, CALIBRATION_KEY, None)
    if found is None:
        raise RunError(
            f"{where}: the model was not calibrated: its config.json has no {CALIBRATION_KEY}. Leave out "
            f"--calibrated, or train with evaluation.calibrate=true"
        )
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < float("inf"):
        raise RunError(f"{where}: {CALIBRATION_KEY} in config.json is {found!r}; expected a number above 0")
    return float(found)
