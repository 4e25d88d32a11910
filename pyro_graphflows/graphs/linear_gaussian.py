r"""Linear-Gaussian Bayesian networks: the case in which every answer is exact.

Each node is a linear function of its parents plus independent normal noise,

.. math:: x_v = a_v + \sum_{u \in \mathrm{Pa}(v)} b_{vu} x_u + s_v \varepsilon_v .

So all nodes together are :math:`x = \mu + A \varepsilon`, where row ``v`` of :math:`A` (lower triangular in
topological order) is the *loading* of node ``v`` on the noises. All computations here work on these rows, by
orthogonal projection (QR) after scaling each to unit length, and never on the covariance :math:`A A^\top`:
that would square the condition number, and published networks mix scales that differ by a factor of 10⁴.

The worked example is ``z ~ N(0, 1)``, ``x ~ N(z, 1)``: the rows are (1, 0) and (1, 1), the projection of the
first on the second is half of it, and what is left has squared length 1/2. So ``z | x ~ N(x / 2, 1 / 2)``.

:class:`LinearGaussianModel`, the network as a Pyro model, is the only place in ``graphs`` that calls torch and Pyro.

Exact Gaussian conditioning on rows: variables as vectors in the space of independent unit noises.

A jointly normal vector is :math:`\mu + A \varepsilon`. Row ``v`` of :math:`A` stands for variable ``v``:
inner products are covariances, squared lengths are variances, conditioning is orthogonal projection. Rows are
scaled to unit length before each factorisation, so that the units of the variables do not matter.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import qr, solve_triangular

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.graphs.structures import InverseGraph, ModelGraph, listed, topological_order

__all__ = [
    "Array",
    "LinearGaussianModel",
    "LinearGaussianNetwork",
    "half_log_det",
    "regress",
    "triangle",
]

Array = NDArray[np.float64]


def triangle(rows: Array) -> tuple[Array, Array]:
    r"""Return :math:`R` (D, D) and lengths :math:`d` (D,) with :math:`A A^\top = DR^\top RD`, D = diag(d).

    The absolute value of entry i of the diagonal of :math:`R` is the standard deviation of variable i given
    the variables before it, in units of its own marginal standard deviation.

    Args:
        rows: Linearly independent rows (D, N).

    Example:
        >>> upper, lengths = triangle(np.array([[3.0, 0.0], [0.0, 1.0]]))
        >>> np.abs(np.diag(upper)).tolist(), lengths.tolist()
        ([1.0, 1.0], [3.0, 1.0])
    """
    lengths = np.linalg.norm(rows, axis=1)
    (upper,) = qr((rows / lengths[:, None]).T, mode="r")
    return upper[: len(rows)], lengths


def half_log_det(upper: Array, lengths: Array) -> float:
    """Return half the log-determinant of the covariance whose :func:`triangle` is given."""
    return float(np.log(np.abs(np.diag(upper))).sum() + np.log(lengths).sum())


def regress(targets: Array, regressors: Array) -> tuple[Array, Array]:
    """Return the regression of some variables on others.

    Args:
        targets: Rows (K, N).
        regressors: Linearly independent rows (D, N).

    Returns:
        The coefficients (K, D) and the residual rows (K, N), orthogonal to the regressors.

    Example:
        >>> coefficients, residual = regress(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))
        >>> coefficients.round(6).tolist(), residual.round(6).tolist()
        ([[0.5]], [[0.5, -0.5]])
    """
    if not len(regressors):
        return np.zeros((len(targets), 0)), targets
    lengths = np.linalg.norm(regressors, axis=1)
    basis, upper = qr((regressors / lengths[:, None]).T, mode="economic")  # (N, D), (D, D)
    projected = targets @ basis  # (K, D)
    residual = targets - projected @ basis.T
    correction = residual @ basis  # a second projection keeps small residuals accurate
    residual = residual - correction @ basis.T
    return solve_triangular(upper, (projected + correction).T).T / lengths, residual


LOG_TWO_PI = math.log(2 * math.pi)


class LinearGaussianNetwork:
    r"""An immutable linear-Gaussian Bayesian network with its exact inference.

    Args:
        parents: For each node the names of its parents. The order of the nodes breaks ties in :attr:`names`.
        coefficients: For each node either a mapping parent → coefficient or one number per parent, in the
            order of ``parents[name]``. Nodes without parents may be left out.
        intercepts: The intercept :math:`a_v` of each node; 0 where nothing is said.
        scales: The standard deviation :math:`s_v > 0` of each node given its parents.
        observed: The observed nodes, or ``"leaves"`` for all nodes without children.

    Raises:
        GraphflowsError: If a name is unknown, a node names a parent twice, coefficients do not match the
            parents, a number is not finite or a scale is not positive. The message names the node.
        NotADAGError: If there is a directed cycle. The message lists one.

    Example:
        >>> net = LinearGaussianNetwork({"z": [], "x": ["z"]}, {"x": [1.0]}, {}, {"z": 1.0, "x": 1.0})
        >>> net.latent, net.observed
        (('z',), ('x',))
        >>> mean, covariance = net.posterior([[2.0]])
        >>> mean.round(6).tolist(), covariance.round(6).tolist()
        ([[1.0]], [[0.5]])
    """

    def __init__(
        self,
        parents: Mapping[str, Sequence[str]],
        coefficients: Mapping[str, Mapping[str, float] | Sequence[float]],
        intercepts: Mapping[str, float],
        scales: Mapping[str, float],
        *,
        observed: Iterable[str] | str = "leaves",
    ) -> None:
        families = {name: tuple(above) for name, above in parents.items()}
        for what, given in (("coefficients", coefficients), ("intercepts", intercepts), ("scales", scales)):
            _check_known(given, families, what)
        for name, above in families.items():
            _check_known(above, families, f"the parents of {name}")
            if len(set(above)) < len(above):
                raise GraphflowsError(f"Expected each parent of {name} once; got {', '.join(above)}.")
        missing = [name for name in families if name not in scales]
        if missing:
            raise GraphflowsError(f"Expected a scale for every node; got none for {listed(missing)}.")
        names: Any = topological_order(_digraph(families))
        self._names: tuple[str, ...] = names
        self._parents = {name: families[name] for name in names}
        self._coefficients = {
            name: _coefficients(name, families[name], coefficients.get(name, ())) for name in names
        }
        self._intercepts = {name: _finite(intercepts.get(name, 0.0), "intercept", name) for name in names}
        self._scales = {name: _finite(scales[name], "scale", name) for name in names}
        for name, scale in self._scales.items():
            if scale <= 0:
                raise GraphflowsError(f"Expected a positive scale for {name}; got {scale}.")
        self._observed = self._resolve(observed)

    @classmethod
    def random(cls, graph: ModelGraph, seed: int | np.random.Generator) -> "LinearGaussianNetwork":
        """Give a graph random parameters, for which (with probability one) no independence is accidental.

        Weights are uniform on [1/2, 3/2] with a random sign, intercepts standard normal, scales uniform on
        [1/2, 3/2]. Inputs count as observed, marginalised nodes as latent, each node as one scalar.

        Args:
            graph: The structure.
            seed: A seed or a NumPy generator.

        Returns:
            A network over the nodes of ``graph``.

        Example:
            >>> LinearGaussianNetwork.random(ModelGraph([("z", "x")], ["x"]), seed=0).names
            ('z', 'x')
        """
        rng = np.random.default_rng(seed)
        parents: dict[Any, tuple[Any, ...]] = {node: graph.parents(node) for node in graph.nodes}
        coefficients = {
            node: rng.uniform(0.5, 1.5, len(above)) * rng.choice([-1.0, 1.0], len(above))
            for node, above in parents.items()
        }
        intercepts = {node: float(rng.standard_normal()) for node in parents}
        scales = {node: float(rng.uniform(0.5, 1.5)) for node in parents}
        observed: Any = (*graph.inputs, *graph.observed)
        return cls(parents, coefficients, intercepts, scales, observed=observed)

    @property
    def names(self) -> tuple[str, ...]:
        """All nodes, parents before children; ties in the order of the ``parents`` argument."""
        return self._names

    @property
    def observed(self) -> tuple[str, ...]:
        """The observed nodes, in the order of :attr:`names`."""
        return self._observed

    @property
    def latent(self) -> tuple[str, ...]:
        """The latent nodes, in the order of :attr:`names`."""
        known = set(self._observed)
        return tuple(name for name in self._names if name not in known)

    @property
    def parents(self) -> Mapping[str, tuple[str, ...]]:
        """The parents of each node, in the order of its coefficients."""
        return MappingProxyType(self._parents)

    @property
    def coefficients(self) -> Mapping[str, tuple[float, ...]]:
        """The coefficients of each node, one per parent."""
        return MappingProxyType(self._coefficients)

    @property
    def intercepts(self) -> Mapping[str, float]:
        """The intercept of each node."""
        return MappingProxyType(self._intercepts)

    @property
    def scales(self) -> Mapping[str, float]:
        """The standard deviation of each node given its parents."""
        return MappingProxyType(self._scales)

    def with_observed(self, observed: Iterable[str] | str) -> "LinearGaussianNetwork":
        """Return the same network with other observed nodes (names, or ``"leaves"``).

        Raises:
            GraphflowsError: If a name is unknown.
        """
        return LinearGaussianNetwork(
            self._parents, self._coefficients, self._intercepts, self._scales, observed=observed
        )

    def graph(self, observed: Iterable[str] | str | None = None) -> ModelGraph:
        """Return the structure, with the network's own observed nodes or others (names, or ``"leaves"``).

        Raises:
            GraphflowsError: If a name is unknown.
        """
        names = self._observed if observed is None else self._resolve(observed)
        return ModelGraph(_digraph(self._parents), names)

    def mean_and_covariance(self) -> tuple[Array, Array]:
        """Return the joint mean (N,) and covariance (N, N) of all nodes, in the order of :attr:`names`."""
        return self._mean.copy(), self._loadings @ self._loadings.T

    def conditional(self, name: str, given: Iterable[str]) -> tuple[Array, float, float]:
        """Return the exact conditional of one node given others: a linear regression.

        Args:
            name: The node.
            given: The nodes it is conditioned on, none of them ``name``.

        Returns:
            The coefficients, one per name in ``given``, the intercept, and the remaining standard deviation.

        Raises:
            GraphflowsError: If a name is unknown, given twice, or ``name`` itself is among ``given``.

        Example:
            >>> net = LinearGaussianNetwork({"z": [], "x": ["z"]}, {"x": [1]}, {"z": 2}, {"z": 1, "x": 1})
            >>> coefficients, intercept, scale = net.conditional("z", ["x"])
            >>> coefficients.round(6).tolist(), round(intercept, 6), round(scale**2, 6)
            ([0.5], 1.0, 0.5)
        """
        given = _distinct(given, f"the nodes that {name} is conditioned on")
        if name in given:
            raise GraphflowsError(f"Expected nodes other than {name} to condition it on; got itself.")
        coefficients, residual = regress(self._rows((name,)), self._rows(given))
        intercept = self._means((name,))[0] - coefficients[0] @ self._means(given)
        return coefficients[0], float(intercept), float(np.linalg.norm(residual[0]))

    def posterior(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return the posterior of the latent nodes given data.

        Args:
            x: Data (n, D), one column per observed node in the order of :attr:`observed`.

        Returns:
            The means (n, K) and the common covariance (K, K), in the order of :attr:`latent`.

        Raises:
            GraphflowsError: If the shape of ``x`` is not (n, D).
        """
        data = self._data(x)
        coefficients, residual = regress(self._rows(self.latent), self._rows(self._observed))
        deviation = data - self._means(self._observed)
        return self._means(self.latent) + deviation @ coefficients.T, residual @ residual.T

    def log_evidence(self, x: ArrayLike) -> Array:
        """Return the exact log p(x), of shape (n,), of data (n, D) in the order of :attr:`observed`.

        Raises:
            GraphflowsError: If the shape of ``x`` is not (n, D).
        """
        data = self._data(x)
        if not self._observed:
            return np.zeros(len(data))
        upper, lengths = triangle(self._rows(self._observed))
        deviation = (data - self._means(self._observed)) / lengths
        whitened = solve_triangular(upper.T, deviation.T, lower=True)  # (D, n)
        constant = half_log_det(upper, lengths) + 0.5 * len(lengths) * LOG_TWO_PI
        return -0.5 * np.square(whitened).sum(axis=0) - constant

    def entropy(self, names: Iterable[str] | None = None) -> float:
        """Return the joint differential entropy in nats of some nodes; of the observed ones by default.

        The entropy of the observed nodes is the lowest expected negative log-likelihood that any model of new
        data can reach.

        Raises:
            GraphflowsError: If a name is unknown or given twice.
        """
        names = self._observed if names is None else _distinct(names, "the entropy")
        if not names:
            return 0.0
        return half_log_det(*triangle(self._rows(names))) + 0.5 * len(names) * (1 + LOG_TWO_PI)

    def sample(
        self, n: int, seed: int | np.random.Generator | None = None, names: Iterable[str] | None = None
    ) -> Array:
        """Draw independent joint samples.

        Args:
            n: The number of samples.
            seed: A seed, a NumPy generator, or ``None`` for fresh randomness.
            names: The nodes to return, as columns in this order; by default all of :attr:`names`.

        Returns:
            Samples (n, number of names). The same seed gives the same joint draws, whatever ``names``.

        Raises:
            GraphflowsError: If a name is unknown.
        """
        noise = np.random.default_rng(seed).standard_normal((n, len(self._names)))
        samples = np.empty_like(noise)
        for i, name in enumerate(self._names):
            value = self._intercepts[name] + self._scales[name] * noise[:, i]
            for parent, coefficient in zip(self._parents[name], self._coefficients[name], strict=True):
                value = value + coefficient * samples[:, self._positions[parent]]
            samples[:, i] = value
        return samples if names is None else samples[:, self._indices(names)]

    def factorization_gap(self, inverse: InverseGraph) -> float:
        r"""Return what the structure of an inverse costs, in nats: zero if it is faithful.

        With U(z) the observed nodes and the latent ones sampled before z, the gap is
        :math:`\sum_z I(z ; U(z) \setminus \mathrm{Pa}(z) \mid \mathrm{Pa}(z))`. It is the least expected
        :math:`\mathrm{KL}(p(z|x) \,\|\, q(z|x))` of all guides q that factorise like the inverse, and it is
        reached by Gaussian ones. For generic parameters it is zero only if the inverse is faithful.

        Args:
            inverse: An inverse of this network's graph. Observed, input and marginalised nodes are those of
                ``inverse.graph``, which may differ from :attr:`observed`.

        Returns:
            The gap, a sum of terms that are never negative; see :meth:`factorization_gap_terms`.

        Raises:
            GraphflowsError: If the inverse has nodes that are not in the network.
        """
        return math.fsum(self.factorization_gap_terms(inverse).values())

    def factorization_gap_terms(self, inverse: InverseGraph) -> dict[str, float]:
        """Return the term of each latent node in :meth:`factorization_gap`, in the sampling order.

        Raises:
            GraphflowsError: If the inverse has nodes that are not in the network.
        """
        order: Any = tuple(inverse.sampling_order)
        known: Any = (*inverse.graph.inputs, *inverse.graph.observed)
        _check_known((*known, *order), self._parents, "the inverse")
        # Entry i of the diagonal is the scaled standard deviation of node i given all nodes before it.
        upper, _ = triangle(self._rows((*known, *order)))
        terms = {}
        for i, node in enumerate(order, start=len(known)):
            above: Any = inverse.parents[node]
            family, _ = triangle(self._rows((*above, node)))
            # Conditioning never adds variance: a negative difference is rounding.
            terms[node] = max(0.0, math.log(abs(family[-1, -1]) / abs(upper[i, i])))
        return terms

    def pyro_model(self) -> "LinearGaussianModel":
        """Return the network as a Pyro model, ``model(x=None, num_samples=1)``.

        It has one site for each node, named after it, in a plate ``"data"`` at dim -1. With ``x``, a
        tensor (n, D) in the order of :attr:`observed`, the observed sites are conditioned on its columns and
        the plate has size n; without, all sites are sampled and the plate has size ``num_samples``. Values
        have the type and device of ``x``, else torch's defaults. The model can be copied and pickled.
        """
        return LinearGaussianModel(self)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self._names)}

    @cached_property
    def _mean(self) -> Array:
        mean = np.empty(len(self._names))
        for i, name in enumerate(self._names):
            rows = [self._positions[parent] for parent in self._parents[name]]
            mean[i] = self._intercepts[name] + np.dot(self._coefficients[name], mean[rows])
        return mean

    @cached_property
    def _loadings(self) -> Array:
        loadings = np.zeros((len(self._names), len(self._names)))
        for i, name in enumerate(self._names):
            rows = [self._positions[parent] for parent in self._parents[name]]
            loadings[i] = np.asarray(self._coefficients[name]) @ loadings[rows]
            loadings[i, i] = self._scales[name]
        return loadings

    def _indices(self, names: Iterable[str]) -> list[int]:
        names = tuple(names)
        _check_known(names, self._parents, "the argument")
        return [self._positions[name] for name in names]

    def _means(self, names: Iterable[str]) -> Array:
        return self._mean[self._indices(names)]

    def _rows(self, names: Iterable[str]) -> Array:
        return self._loadings[self._indices(names)]

    def _data(self, x: ArrayLike) -> Array:
        data = np.asarray(x, dtype=np.float64)
        if data.ndim != 2 or data.shape[1] != len(self._observed):
            raise GraphflowsError(
                f"Expected x of shape (n, {len(self._observed)}), one column for each of "
                f"{', '.join(self._observed)}; got {data.shape}."
            )
        return data

    def _resolve(self, observed: Iterable[str] | str) -> tuple[str, ...]:
        if isinstance(observed, str):
            if observed != "leaves":
                raise GraphflowsError(f'Expected "leaves" or a collection of names; got {observed!r}.')
            chosen = set(self._names).difference(*self._parents.values())
        else:
            chosen = set(observed)
            _check_known(chosen, self._parents, "observed")
        return tuple(name for name in self._names if name in chosen)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LinearGaussianNetwork) and all(
            getattr(self, field) == getattr(other, field)
            for field in ("_names", "_observed", "_parents", "_coefficients", "_intercepts", "_scales")
        )

    def __hash__(self) -> int:
        return hash((self._names, self._observed, tuple(self._coefficients.values())))

    def __repr__(self) -> str:
        edges = sum(map(len, self._parents.values()))
        return (
            f"LinearGaussianNetwork({len(self.latent)} latent, {len(self._observed)} observed, {edges} edges)"
        )


class LinearGaussianModel:
    """A linear-Gaussian network as a Pyro model; see :meth:`LinearGaussianNetwork.pyro_model`."""

    def __init__(self, network: LinearGaussianNetwork) -> None:
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


def _check_known(names: Iterable[str], known: Mapping[str, Any], what: str) -> None:
    unknown = {name for name in names if name not in known}
    if unknown:
        raise GraphflowsError(
            f"Expected names of nodes of the network in {what}; got unknown {listed(unknown)}. "
            f"The nodes are {listed(known)}."
        )


def _distinct(names: Iterable[str], what: str) -> tuple[str, ...]:
    names = tuple(names)
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise GraphflowsError(f"Expected each name once in {what}; got {listed(twice)} more than once.")
    return names


def _finite(value: float, what: str, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise GraphflowsError(f"Expected a finite {what} for {name}; got {number}.")
    return number


def _coefficients(
    name: str, parents: tuple[str, ...], given: Mapping[str, float] | Sequence[float]
) -> tuple[float, ...]:
    if isinstance(given, Mapping):
        if set(given) != set(parents):
            raise GraphflowsError(
                f"Expected coefficients of {name} for its parents ({', '.join(parents) or 'none'}); "
                f"got them for {listed(given) or 'none'}."
            )
        given = [given[parent] for parent in parents]
    if len(given) != len(parents):
        raise GraphflowsError(
            f"Expected {len(parents)} coefficients for {name}, one per parent "
            f"({', '.join(parents) or 'none'}); got {len(given)}."
        )
    return tuple(_finite(value, "coefficient", name) for value in given)


def _digraph(parents: Mapping[str, Sequence[str]]) -> Any:
    dag = nx.DiGraph()
    dag.add_nodes_from(parents)
    dag.add_edges_from((parent, name) for name, above in parents.items() for parent in above)
    return dag
