"""What a model predicts at draws of its latent sites: for the data it was fitted to, or for others.

The elements of a plate are the same ones wherever the plate has the same name: element i of new data is element i of
the fitted ones. Elements beyond those fitted (a new school, a new group) have latent values that the data say nothing
about directly; they are drawn from the model given the draws of the others, which is their exact posterior where plates
are independent given what is outside. ``new_plates`` says that all elements of a plate are others than those fitted.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_factor
from torch import Tensor
from tqdm.auto import tqdm

from pyro_graphflows.errors import GraphflowsError, UnsupportedModelError
from pyro_graphflows.infer.model_runs import (
    Fitted,
    ModelRuns,
    SiteShape,
    chunk_size,
    chunks,
    joined,
    single,
    site_shapes,
    stacked,
)
from pyro_graphflows.infer.particles import all_sites, count_plate_dims, plates_of

__all__ = ["Prediction", "predict"]


class Prediction(Mapping[str, Tensor]):
    """Posterior predictive draws: site name to tensor, draws along the first dimension.

    Attributes:
        returned: What the model returned, draws along the first dimension of each tensor; parts that are no tensors
            are as one run returned them.
    """

    def __init__(self, values: Mapping[str, Tensor], returned: Any) -> None:
        self._values = dict(values)
        self.returned = returned

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self._values.items())
        return f"Prediction({sites})"


class _Unobserve(UnconditionMessenger):
    """Draw observed sites; leave what is computed as it is."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic") and not site_is_factor(msg):
            super()._pyro_sample(msg)


class _HoldFitted(Messenger):
    """Give latent sites their draws, and leave elements beyond those fitted as the model draws them.

    Args:
        draws: Values by site name: draws along the first dimension, or one draw without it.
        sites: What the sites were like when they were fitted.
        new_plates: Plates whose elements are others than those fitted.
        batch: Whether there is a dimension of draws.
    """

    def __init__(
        self,
        draws: Mapping[str, Tensor],
        sites: Mapping[str, SiteShape],
        new_plates: Collection[str],
        batch: bool,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.sites = sites
        self.new_plates = new_plates
        self.batch = batch

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.draws or msg["is_observed"]:
            return
        fitted = self.sites[name]
        places = {frame.name: (frame.dim or 0, frame.size) for frame in plates_of(msg)}
        if {plate: dim for plate, (dim, _) in places.items()} != {
            plate: dim for plate, dim, _ in fitted.plates
        }:
            raise GraphflowsError(
                f"Expected site {name!r} in the plates {[plate for plate, _, _ in fitted.plates]} at the dimensions "
                f"{[dim for _, dim, _ in fitted.plates]}, as it was fitted; the model has it in {list(places)} at "
                f"{[dim for dim, _ in places.values()]} for these arguments."
            )
        if any(plate in self.new_plates for plate in places):
            return
        for plate, _, size in fitted.plates:
            if places[plate][1] < size:
                raise GraphflowsError(
                    f"Expected at least the {size} elements of the plate {plate!r} that were fitted at site {name!r}; "
                    f"got {places[plate][1]}. Name the plate in new_plates if its elements are others."
                )
        event = fitted.shape[fitted.num_batch :]
        if tuple(msg["fn"].event_shape) != event:
            raise GraphflowsError(
                f"Expected site {name!r} to have draws of shape {event}, as it was fitted; for these arguments they "
                f"have {tuple(msg['fn'].event_shape)}. Only plates can have other sizes."
            )
        rank = len(msg["fn"].batch_shape)
        value, lead = self.draws[name], int(self.batch)
        between = [1] * (rank - lead - fitted.num_batch)
        value = value.reshape((*value.shape[:lead], *between, *fitted.shape))
        if all(places[plate][1] == size for plate, _, size in fitted.plates):
            msg["value"] = value.expand(msg["fn"].shape())
        else:
            drawn = msg["fn"].sample().clone()
            sizes = {dim: size for _, dim, size in fitted.plates}
            drawn[tuple(slice(sizes.get(dim)) for dim in range(-rank, 0))] = value
            msg["value"] = drawn
        msg["done"] = True


def predict(
    fitted: Fitted,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    draws: Mapping[str, Tensor],
    *,
    new_plates: Collection[str],
    progress: bool,
) -> Prediction:
    """Run a model at draws of its latent sites with its observed sites drawn; keep what is not latent.

    Args:
        fitted: The model, and what its sites were like when they were fitted.
        arguments: The model's positional and keyword arguments now.
        draws: Values of latent sites, draws along the first dimension.
        new_plates: Plates whose elements are others than those fitted.
        progress: Whether to show a bar when it takes long.

    Returns:
        Draws of the observed and the deterministic sites and of what the model returns.

    Raises:
        GraphflowsError: If a site is not in the plates it was fitted in, or has fewer elements.
    """
    num = len(next(iter(draws.values())))
    (args, kwargs), sites = arguments, fitted.sites
    program = _Unobserve()(fitted.model)

    def hold(values: Mapping[str, Tensor], batch: bool) -> Messenger:
        return _HoldFitted(values, sites, new_plates, batch)

    alone = ModelRuns(program, args, kwargs, 0, hold).alone({name: value[0] for name, value in draws.items()})
    known = {frame.name for _, site in all_sites(alone.trace) for frame in plates_of(site)}
    unknown = sorted(set(new_plates) - known)
    if unknown:
        raise GraphflowsError(f"Expected new_plates among the plates {sorted(known)}; got {unknown}.")
    runs = ModelRuns(program, args, kwargs, count_plate_dims(alone.trace), hold)
    now = site_shapes(alone.trace)
    kept = {
        name: now[name]
        for name, site in all_sites(alone.trace)
        if not site_is_factor(site)
        if now[name].kind == "deterministic"
        or "was_observed" in site["infer"]
        or (name in sites and sites[name].kind == "observed")
    }
    parts: list[tuple[dict[str, Tensor], Any]] = []
    with tqdm(total=num, disable=not progress, delay=2.0, unit="draw", desc="predicting") as bar:
        if fitted.vectorize:
            for part in chunks(num, chunk_size(alone.trace)):
                held = {name: value[part] for name, value in draws.items()}
                try:
                    run = runs.batch(held, part.stop - part.start)
                    if not parts and runs.differs_alone(run, alone, now):
                        raise UnsupportedModelError("The model mixes draws.")
                except UnsupportedModelError:
                    if parts:
                        raise
                    break  # not written for batches: one by one
                parts.append((runs.values(run, kept), stacked(run.returned, alone.returned, run.size)))
                bar.update(run.size)
        if not parts:
            for place in range(num):
                run = runs.alone({name: value[place] for name, value in draws.items()})
                values = {name: torch.as_tensor(run.trace.nodes[name]["value"])[None] for name in kept}
                parts.append((values, single(run.returned)))
                bar.update()
    values = {name: torch.cat([part[name] for part, _ in parts]) for name in kept}
    return Prediction(values, joined([returned for _, returned in parts]))
