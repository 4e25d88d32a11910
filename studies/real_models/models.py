"""The 33 posteriors of posteriordb and six targets of the Inference Gym by name, hierarchical ones first."""

from studies.real_models.gym import GYM
from studies.real_models.hierarchical import HIERARCHICAL
from studies.real_models.others import OTHERS
from studies.real_models.posterior import Posterior
from studies.real_models.regressions import REGRESSIONS
from studies.real_models.time_series import TIME_SERIES

POSTERIORS: dict[str, Posterior] = {
    posterior.name: posterior for posterior in [*HIERARCHICAL, *OTHERS, *TIME_SERIES, *REGRESSIONS, *GYM]
}


def find(words: list[str]) -> list[Posterior]:
    """Return the posteriors whose name contains one of the words, or whose kind is one; all if there are no words.

    Raises:
        SystemExit: If a word finds nothing.
    """
    for word in words:
        if not any(word in posterior.name or word == posterior.kind for posterior in POSTERIORS.values()):
            raise SystemExit(f"Expected part of a posterior's name or a kind; nothing matches {word!r}.")
    return [
        posterior
        for posterior in POSTERIORS.values()
        if not words or any(word in posterior.name or word == posterior.kind for word in words)
    ]
