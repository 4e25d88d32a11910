"""d-separation from its definition, by enumerating all paths: an oracle for small graphs."""


class Paths:
    """All simple paths of a DAG given by its edges.

    A path is blocked by a set if it has a collider without a descendant in the set, or another inner node in it.
    """

    def __init__(self, nodes, edges):
        self.edges = set(edges)
        self.below = {node: {node} for node in nodes}
        for _ in nodes:
            for a, b in self.edges:
                self.below[a] |= self.below[b]
        self.paths = {(a, b): [] for a in nodes for b in nodes}
        for start in nodes:
            self._extend((start,))
        self.cache = {}

    def _extend(self, path):
        for a, b in self.edges:
            for here, there in ((a, b), (b, a)):
                if here == path[-1] and there not in path:
                    self.paths[path[0], there].append((*path, there))
                    self._extend((*path, there))

    def _open(self, path, given):
        for before, node, after in zip(path, path[1:], path[2:], strict=False):
            collider = (before, node) in self.edges and (after, node) in self.edges
            if collider and not self.below[node] & given:
                return False
            if not collider and node in given:
                return False
        return True

    def separated(self, a, b, given):
        key = (a, b, frozenset(given))
        if key not in self.cache:
            self.cache[key] = not any(self._open(path, key[2]) for path in self.paths[a, b])
        return self.cache[key]

    def violations(self, inverse):
        """Return the pairs (node, other) whose independence given the node's parents is asserted but false."""
        earlier = {*inverse.graph.observed, *inverse.graph.inputs}
        found = set()
        for node in inverse.sampling_order:
            parents = set(inverse.parents[node])
            assert parents <= earlier
            found |= {(node, x) for x in earlier - parents if not self.separated(node, x, parents)}
            earlier.add(node)
        return found

    def is_minimal_imap(self, inverse):
        """Whether each latent is separated from all before it by its parents, and by no fewer."""
        return not self.violations(inverse) and not any(
            self.separated(node, parent, set(parents) - {parent})
            for node, parents in inverse.parents.items()
            for parent in parents
        )
