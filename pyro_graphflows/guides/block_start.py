"""How one block starts: standardised, by regression if that is better than at random, free parameters narrow."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_graphflows.guides.coupled_start import start_chains_
from pyro_graphflows.guides.features import FeatureMap, concatenate
from pyro_graphflows.guides.index_start import regress_indices_
from pyro_graphflows.guides.made import MADEBlock
from pyro_graphflows.guides.set_up import SetUp
from pyro_graphflows.guides.start import block_loss, regress_, standardize_

__all__ = ["start_block_"]

TIE = 0.01  # nats by which the regression start may seem worse; without parents both starts are alike
FREE_SCALE = 0.1  # sites with free parameters start at their prior, this much narrower
HELD_OUT = 5  # one in this many samples judges the regression start
LEAST_ROWS = 20  # finite ones, without which there is no regression


def start_block_(
    network: Any,
    feature: FeatureMap,
    context: Sequence[str],
    rows: Mapping[str, Tensor] | None,
    set_up: SetUp,
    *,
    regression: bool,
) -> list[str]:
    """Give a block its starting values.

    Args:
        network: The block.
        feature: The map from the values of its context to features.
        context: The names of the context.
        rows: Rows of joint samples; None where there are none.
        set_up: What is known at set-up.
        regression: Whether to start by regression.

    Returns:
        What is worth saying of it.
    """
    block = network.block
    notes: list[str] = []
    kept = False
    if rows is not None:
        latents = {site: rows[site] for site in block.sites}
        if set_up.standardize:
            discrete = [site for site in latents if set_up.sites[site].encoding is not None]
            standardize_(network, latents, discrete)
        if regression:
            features = feature(concatenate([rows[name] for name in context]))
            finite = torch.isfinite(torch.cat([features, *latents.values()], -1)).all(-1)
            features = features[finite] if features.shape[-1] else features
            note = _regress_if_better_(network, features, {n: v[finite] for n, v in latents.items()})
            kept = note is None
            notes += [] if note is None else [note]
            if kept and (block.unlike or block.chained):
                aligned = set_up.aligned(context, block.sites, feature)
                notes += _start_indices_(network, set_up, *aligned)
                if block.chained:
                    start_chains_(network, set_up.plates, *aligned)
    if block.chained and not kept:
        start_chains_(network, set_up.plates)
    if regression:
        network.narrow_free_(FREE_SCALE)
    return notes


def _regress_if_better_(network: MADEBlock, context: Tensor, values: dict[str, Tensor]) -> str | None:
    """Set the factors by regression, or go back, and say so, if held-out samples like the random start better."""
    number = len(next(iter(values.values())))
    if number < LEAST_ROWS:
        return (
            f"the random start was kept for {', '.join(network.block.sites)}: of the joint samples only {number} are "
            f"finite there, and a regression needs {LEAST_ROWS} (num_start_samples=)."
        )
    held_out = slice(0, None, HELD_OUT)
    test = {site: value[held_out] for site, value in values.items()}
    rest = torch.arange(number) % HELD_OUT != 0
    fitted = {site: value[rest] for site, value in values.items()}
    random_state = {key: value.clone() for key, value in network.state_dict().items()}
    random_loss = block_loss(network, context[held_out], test)
    regress_(network, context[rest] if context.shape[-1] else context, fitted)
    loss = block_loss(network, context[held_out], test)
    if not (loss <= random_loss + TIE or (random_loss != random_loss and loss == loss)):
        network.load_state_dict(random_state)
        return (
            f"the random start was kept for {', '.join(network.block.sites)}: its loss on prior samples is "
            f"{random_loss:.3g} nats, that of the regression start {loss:.3g}."
        )
    regress_(network, context, values)
    return None


def _start_indices_(
    network: Any, set_up: SetUp, context: Tensor, values: Mapping[str, Tensor]
) -> Collection[str]:
    """Start the maps that elements of a plate have of their own; say where that was not possible."""
    block = network.block
    return [
        f"the maps of the indices of {', '.join(block.unlike[site])} for {site} start at one that is shared: no "
        "regression of each was possible."
        for site in block.unlike
        if site not in block.free and not regress_indices_(network, site, set_up.plates, context, values)
    ]
