"""A linear-Gaussian network as a Pyro model: the only place in ``graphs`` that calls torch and Pyro."""

from typing import TYPE_CHECKING, Any

from pyro_graphflows.errors import GraphflowsError

if TYPE_CHECKING:
    from pyro_graphflows.graphs.linear_gaussian import LinearGaussianNetwork

__all__ = ["LinearGaussianModel"]


class LinearGaussianModel:
    """A linear-Gaussian network as a Pyro model; see :meth:`LinearGaussianNetwork.pyro_model`."""

    def __init__(self, network: "LinearGaussianNetwork") -> None:
        self.observed = network.observed
        columns = {name: i for i, name in enumerate(network.observed)}
        self._sites = tuple(
            (
                name,
                tuple(zip(network.parents[name], network.coefficients[name], strict=True)),
                network.intercepts[name],
                network.scales[name],
                columns.get(name),
            )
            for name in network.names
        )

    def __call__(self, x: Any = None, num_samples: int = 1) -> dict[str, Any]:
        """Run the model and return the value of each site.

        Args:
            x: Data, a tensor (n, D) in the order of :attr:`observed`, or ``None`` to sample these sites too.
            num_samples: The size of the data plate when ``x`` is not given.

        Raises:
            GraphflowsError: If the shape of ``x`` is not (n, D).
        """
        import pyro
        import pyro.distributions as dist
        import torch

        if x is None:
            new, size = torch.tensor, num_samples
        elif x.dim() == 2 and x.shape[1] == len(self.observed):
            new, size = x.new_tensor, x.shape[0]
        else:
            raise GraphflowsError(
                f"Expected x of shape (n, {len(self.observed)}), one column for each of "
                f"{', '.join(self.observed)}; got {tuple(x.shape)}."
            )
        values: dict[str, Any] = {}
        with pyro.plate("data", size, dim=-1):
            for name, terms, intercept, scale, column in self._sites:
                loc = new(intercept)
                for parent, coefficient in terms:
                    loc = loc + coefficient * values[parent]
                data = None if x is None or column is None else x[:, column]
                values[name] = pyro.sample(name, dist.Normal(loc, new(scale)), obs=data)
        return values
