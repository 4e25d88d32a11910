"""A plan in words, as ``guide.describe()`` says it."""

from collections.abc import Collection, Sequence

from pyro_graphflows.graphs.separation import violated_independencies
from pyro_graphflows.guides.plan import Plan

__all__ = ["Description", "describe"]


class Description(str):
    """Text that prints itself at the interactive prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def describe(
    plan: Plan, notes: Sequence[str] = (), summed: Collection[str] = (), alone: Collection[str] = ()
) -> Description:
    """Return a plan in words: a line for each latent site, in sampling order, and what is not faithful.

    Args:
        plan: The plan.
        notes: Further notes, of the start.
        summed: The sites with one factor for each element of a plate.
        alone: The sites that the start left without their prior.
    """
    inverse, graph = plan.inverse, plan.graph
    lines = [
        f"Inverse: order {inverse.order!r}, {_number(inverse.num_edges, 'edge')}, "
        f"{_number(len(inverse.levels), 'sampling level')}, {_number(len(plan.blocks), 'block')}."
    ]
    for index, block in enumerate(plan.blocks):
        where = (
            f"plate{'s' * (len(block.plates) > 1)} {', '.join(block.plates)}" if block.plates else "no plate"
        )
        lines.append(f"Block {index} ({where}, {_number(len(block.levels), 'level')}):")
        for depth, level in enumerate(block.levels):
            for site in level:
                looks = ", ".join(_input(plan, parent, site) for parent in inverse.parents[site])
                fused = site in block.fused and (site not in block.only_summed or site in summed)
                fused = fused and site not in alone
                term = "analytic KL" if plan.analytic_kl[site] and not fused else "sampled KL"
                kind = "per-element parameters" if site in block.per_element else "amortised"
                label = ", fused with its prior" if fused else ""
                label += " and one factor for each element" if site in summed else ""
                label += f", {plan.labels[site]}" if site in plan.labels else ""
                lines.append(f"  level {depth}: {site} | {looks or 'nothing'}  [{kind}, {term}{label}]")
                lines += [f"    {remark}" for remark in plan.inputs.remarks.get(site, ())]
                if site in plan.not_fused:
                    lines.append(f"    not fused with its prior: {plan.not_fused[site]}")
                if site in alone:
                    lines.append("    not fused with its prior: joint samples are likelier without it")
    if graph.marginalised:
        lines.append(f"Marginalised (no factor): {', '.join(map(str, graph.marginalised))}.")
    lines += [f"Note: {note}" for note in (*plan.notes, *notes, *_missing_dependences(plan), *plan.hints)]
    return Description("\n".join(lines))


def _missing_dependences(plan: Plan) -> list[str]:
    missing = list(violated_independencies(plan.judged or plan.inverse))
    if not missing:
        return []
    named = "; ".join(
        f"{statement.node} of {statement.other} given {', '.join(map(str, statement.given)) or 'nothing'}"
        for statement in missing[:3]
    )
    return [
        f"not faithful: the inverse asserts {len(missing)} independencies that the posterior does not have: "
        f"{named}{'; ...' if len(missing) > 3 else ''}. Use inverse='auto'."
    ]


def _input(plan: Plan, parent: object, site: object) -> str:
    if (parent, site) in plan.ways:
        return f"{parent} ({plan.ways[parent, site]})"
    how = plan.inverse.how[parent, site]
    if how == "pooled":  # and no summary has it
        how = "not read"
    return str(parent) if how == "same" else f"{parent} ({how})"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
