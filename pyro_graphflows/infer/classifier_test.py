"""Can a classifier tell two sets of draws apart?"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError, MissingExtraError

__all__ = ["c2st"]


def c2st(
    first: Tensor | Mapping[str, Tensor],
    second: Tensor | Mapping[str, Tensor],
    *,
    num_folds: int = 5,
    seed: int = 0,
) -> float:
    """Return the accuracy with which a neural network tells two sets of draws apart (classifier two-sample test).

    0.5 is that of guessing: the draws look alike; 1 is that of two distributions that do not overlap. The network has
    two hidden layers of ten units for each dimension; its accuracy is that on draws it was not trained on, averaged
    over the folds. Columns are standardised by the first set.

    References:
        [1] Lopez-Paz and Oquab (2017), Revisiting classifier two-sample tests, ICLR.
        [2] Lueckmann, Boelts, Greenberg, Gonçalves and Macke (2021), Benchmarking simulation-based inference, AISTATS,
        whose network and folds these are.

    Args:
        first: Draws along the first dimension, or a dict of such tensors from site to draws.
        second: As many dimensions of others; of as many draws, or the larger set is cut to the smaller.
        num_folds: The number of folds.
        seed: The seed of the network and of the folds.

    Raises:
        GraphflowsError: If the sets have other sites or dimensions, some are not finite, or there are too few draws.
        MissingExtraError: If scikit-learn is not installed.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> c2st(torch.randn(200, 2), torch.randn(200, 2) + 10)
        1.0
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise MissingExtraError(
            "Expected scikit-learn for c2st; it is not installed. Run pip install 'pyro-graphflows[c2st]'."
        ) from error
    one, two = _columns(first, second)
    num = min(len(one), len(two))
    if num < 2 * num_folds or num_folds < 2:
        raise GraphflowsError(
            f"Expected two or more folds, and two draws of each set in each; got {num} draws and num_folds={num_folds}."
        )
    one, two = one[:num], two[:num]
    centre, spread = one.mean(0), one.std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    values = (torch.cat([one, two]) - centre) / spread
    labels = torch.cat([torch.zeros(num), torch.ones(num)])
    width = 10 * values.shape[1]
    network = MLPClassifier(
        hidden_layer_sizes=(width, width),
        max_iter=1000,
        solver="adam",
        random_state=seed,
        early_stopping=False,
    )
    folds = KFold(n_splits=num_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 1,000 epochs the accuracy is what it is
        scores = cross_val_score(network, values.numpy(), labels.numpy(), cv=folds, scoring="accuracy")
    return float(scores.mean())


def _columns(
    first: Tensor | Mapping[str, Tensor], second: Tensor | Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    if isinstance(first, Mapping) != isinstance(second, Mapping):
        raise GraphflowsError("Expected two tensors, or two dicts from site to draws; got one of each.")
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if set(first) != set(second):
            differing = sorted(set(first) ^ set(second))
            raise GraphflowsError(
                f"Expected draws of the same sites; {differing} are in one of the sets alone."
            )
        names = sorted(first)
        one, two = (torch.cat([_flat(values[name]) for name in names], 1) for values in (first, second))
    else:
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        one, two = _flat(first), _flat(second)
    if one.shape[1] != two.shape[1]:
        raise GraphflowsError(f"Expected draws of as many numbers; got {one.shape[1]} and {two.shape[1]}.")
    for number, values in enumerate((one, two)):
        if not bool(values.isfinite().all()):
            raise GraphflowsError(
                f"Expected finite draws; some of the {('first', 'second')[number]} set are not."
            )
    return one, two


def _flat(values: Tensor) -> Tensor:
    return values.detach().cpu().double().reshape(len(values), -1)
