"""A guide's run: it reads a call and samples block by block, level by level."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.guides.call import Call
from pyro_graphflows.guides.compiled import CompiledGuide
from pyro_graphflows.guides.emission import site_distribution
from pyro_graphflows.guides.features import FeatureMap, concatenate

__all__ = ["RunningGuide"]


class RunningGuide(CompiledGuide):
    """What a guide does when it is called; see :class:`~pyro_graphflows.guides.AutoFaithfulGuide`."""

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], observations: Mapping[str, Tensor] | None
    ) -> Call:
        """Read the call, and create its plates."""
        if self.master is not None:
            existing = self.master().plates
        elif self.create_plates is not None:
            plates = self.create_plates(*args, **kwargs)
            plates = [plates] if isinstance(plates, pyro.plate) else plates
            existing = {plate.name: plate for plate in plates}
        else:
            existing = {}
        indices = {
            name: plate._indices for name, plate in existing.items() if plate.subsample_size < plate.size
        }
        call = self._reader.read(self.model, args, kwargs, observations, indices)
        self.plates = dict(existing)
        for name, state in sorted(call.plates.items()):
            if name not in self.plates:
                if state.indices is None:
                    self.plates[name] = pyro.plate(name, state.full_size, dim=state.dim)
                else:
                    self.plates[name] = pyro.plate(
                        name, state.full_size, subsample=state.indices, dim=state.dim
                    )
        return call

    def forward(
        self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Sample every latent site given the observed values of this call.

        Args:
            *args: Positional arguments of the model.
            observations: Values of observed sites that replace those of the model (the convention of
                :class:`~pyro.infer.CSIS`).
            **kwargs: Keyword arguments of the model.

        Returns:
            A dict from site to sampled value.

        Raises:
            UnsupportedModelError: If an observed site has no value in this call.
            GraphflowsError: If an observed value is not finite, or ``observations`` has a site that the model has not.
                The message names the site.
        """
        if self._plan is None:
            self.setup(*args, **kwargs)
        self._claim_parameter_names()
        call = self._read(args, kwargs, observations)
        networks: Any = self.networks
        features: Any = self.features
        result: dict[str, Tensor] = {}
        unconstrained: dict[str, Tensor] = {}
        for index, block in enumerate(self.plan.blocks):
            context = self._features_of(index, features[index], call, unconstrained)
            evaluation = networks[index].start(context, call.plates)
            for level in block.levels:
                if any(name in self._changing for name in level):
                    call = self._with_supports(call, args, kwargs, result, level)
                with ExitStack() as stack:
                    for name in block.plates:
                        stack.enter_context(self.plates[name])
                    for name, factor in evaluation.factors().items():
                        result[name], unconstrained[name] = self._sample_site(name, factor, call)
                    evaluation.accept({name: unconstrained[name] for name in level})
        return {name: result[name] for name in self.plan.graph.latent}

    def _claim_parameter_names(self) -> None:
        """Take entries of other guides out of the parameter store where their names are those of this one.

        The store would hand the optimiser of this call the parameters of the guide that came first, and none of this
        guide's would ever be trained. Names are those of classes, so two guides in one program suffice.
        """
        store = pyro.get_param_store()
        if not len(store):
            return
        for part in ("networks", "pools"):
            fullname = self._pyro_get_fullname(part)
            module: Any = self._modules[part]
            for name, parameter in module.named_parameters():
                stored = store._params.get(f"{fullname}$$${name}")
                if stored is not None and stored is not parameter:
                    del store[f"{fullname}$$${name}"]

    def _with_supports(
        self,
        call: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        latents: Mapping[str, Tensor],
        level: Sequence[str],
    ) -> Call:
        """Return the call with the supports of a level's sites as they are given the values sampled so far."""
        indices = {name: plate.indices for name, plate in call.plates.items() if plate.indices is not None}
        supports = self._reader.supports_given(self.model, args, kwargs, latents, indices)
        changed = {name: supports[name] for name in level if name in self._changing}
        return replace(call, supports={**call.supports, **changed})

    def _features_of(
        self, index: int, features: FeatureMap, call: Call, unconstrained: Mapping[str, Tensor]
    ) -> Tensor:
        parts = []
        pools: Any = self.pools[index]
        dtype = features.shift.dtype
        for position, name in enumerate(self._context[index]):
            if str(position) in pools:
                pool = pools[str(position)]
                values = {m.name: self._flat_value(m.name, call, unconstrained, dtype) for m in pool.members}
                values.update({name: call.values[name] for name in pool.indices})
                parts.append(pool(values, call.plates, call.masks))
            else:
                parts.append(self._flat_value(name, call, unconstrained, dtype))
        flat = concatenate(parts)
        if not bool(torch.isfinite(flat).all()):
            guilty = [
                n for n, p in zip(self._context[index], parts, strict=True) if not torch.isfinite(p).all()
            ]
            raise GraphflowsError(
                f"Expected finite values of the data the guide conditions on; {', '.join(guilty)} have NaN or "
                "infinite entries. Remove them, or model them as missing with pyro.sample(..., obs_mask=...)."
            )
        expected = features.shift.shape[0]
        if flat.shape[-1] != expected:
            sizes = ", ".join(f"{n}: {p.shape[-1]}" for n, p in zip(self._context[index], parts, strict=True))
            raise GraphflowsError(
                f"Expected {expected} conditioning features in all, as when the guide was set up; got {sizes}."
            )
        return features(flat)

    def _flat_value(
        self, name: str, call: Call, unconstrained: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Tensor:
        if name in unconstrained:
            return unconstrained[name]
        return self._reader.flat(name, call.values[name], self._event_dims[name], dtype)

    def _sample_site(self, name: str, factor: dist.TorchDistribution, call: Call) -> tuple[Tensor, Tensor]:
        site = self._sites[name]
        features: Any = self.features
        fn, read_back = site_distribution(
            site,
            factor,
            call.supports[name],
            analytic_kl=self.plan.analytic_kl[name],
            dtype=features[0].shift.dtype,
        )
        masked = fn
        if name in call.masks:
            masked = fn.mask(call.masks[name])
        with ExitStack() as stack:
            if name in call.scales:
                stack.enter_context(poutine.scale(scale=call.scales[name]))
            infer = {"infer": {"enumerate": "parallel"}} if name in self._enumerated else {}
            value = self._emit(name, masked, **infer)
        return value, read_back(value)
