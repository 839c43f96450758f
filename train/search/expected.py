"""What true scores are to be expected of mixtures, given all that were measured.

The highest of several noisy scores is high by luck as well (the winner's curse), and so is the gain
of whoever was chosen for it. But the mixtures of a search share experts: each expert was seen in
several, among others that helped or did not. So the true scores are taken to be

    a start + what every expert adds + what every pair adds more or less + the rest of a run,

with normal parts of unknown size, and noise as the scores have it. What the sizes are, and what
experts add on average, is left to the data (empirical Bayes, Efron and Morris 1973): each
combination of a wide grid counts by how well it predicts the scores. Where gains are no larger than
noise they shrink to nothing, and where they are far above it they stay what they are.
"""

from __future__ import annotations

import math

import numpy as np

from train.search.scores import Evidence, Floats
from train.search.trial import Members

SIZES = 6
"""Steps from far below the noise to the largest difference between scores."""
PAIRS = (0.0, 0.3, 1.0)
"""What pairs add, against what experts add."""
REST = (0.0, 1.0, 3.0)
"""What a run adds that items do not show, against the noise; only where no mixture has two runs."""
MEANS = (-2.0, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 2.0)
"""What experts add on average, against the noise."""
LEAST = 1e-4
"""Weight of a grid point that is still counted."""


class Expected:
    """True scores of the measured mixtures, as a distribution over them all."""

    def __init__(self, evidence: Evidence) -> None:
        mixtures = list(evidence.measured)
        self._row = {members: row for row, members in enumerate(mixtures)}
        scores = np.array([evidence.score(members) for members in mixtures])
        self._start = float(scores.mean())
        noise = evidence.covariance
        typical = _typical(noise, scores)
        rest = (0.0,) if "seeds" in evidence.noise_of else REST
        parts = _parts(mixtures, typical, float(np.ptp(scores)))
        extra = np.array(rest)[:, None, None] ** 2 * typical**2 * np.eye(len(scores))
        jitter = 1e-6 * typical**2 * np.eye(len(scores))
        total = (parts[:, None] + noise + extra + jitter).reshape(-1, *noise.shape)
        parts = np.repeat(parts, len(rest), axis=0)
        counts = np.array([len(members) for members in mixtures], dtype=np.float64)
        prior = typical * np.array(MEANS)[:, None] * (counts - counts.min())
        self._weigh(scores - self._start, prior, parts, total)

    def score(self, members: Members) -> float:
        """Its expected true score."""
        return self._start + float(self._weights @ self._means[:, self._row[members]])

    def better(self, one: Members, other: Members) -> float:
        """Probability that `one` is truly better than `other`."""
        first, second = self._row[one], self._row[other]
        lead = self._means[:, first] - self._means[:, second]
        spread = (
            self._spread[:, first, first]
            + self._spread[:, second, second]
            - 2 * self._spread[:, first, second]
        )
        ratio = lead / np.sqrt(2 * np.maximum(spread, np.finfo(float).tiny))
        return float(self._weights @ [(1 + math.erf(value)) / 2 for value in ratio])

    def _weigh(self, scores: Floats, prior: Floats, parts: Floats, total: Floats) -> None:
        """The distribution at every grid point (sizes x means), and its weight."""
        inverse = np.linalg.inv(total)
        pull = parts @ inverse  # (sizes, mixtures, mixtures)
        off = scores - prior  # (means, mixtures)
        misfit = np.einsum("mi,sij,mj->sm", off, inverse, off)
        likelihood = -0.5 * (misfit + np.linalg.slogdet(total)[1][:, None])
        weights = np.exp(likelihood - likelihood.max())
        weights /= weights.sum()
        size, mean = np.nonzero(weights > LEAST)
        self._weights = weights[size, mean] / weights[size, mean].sum()
        self._means = prior[mean] + np.einsum("nij,nj->ni", pull[size], off[mean])
        self._spread = (parts - pull @ parts)[size]


def _typical(noise: Floats, scores: Floats) -> float:
    """One sigma of the noise in a difference of two scores; never quite zero."""
    own = np.diag(noise)
    differences = own[:, None] + own - 2 * noise
    middle = float(np.median(differences[np.triu_indices(len(own), 1)])) if len(own) > 1 else 0.0
    return max(math.sqrt(max(middle, 0.0)), 1e-6 * (float(np.abs(scores).max()) or 1.0))


def _parts(mixtures: list[Members], typical: float, widest: float) -> Floats:
    """(sizes, mixtures, mixtures): how alike true scores are, from the experts that are shared."""
    names = list(dict.fromkeys(name for members in mixtures for name in members))
    everywhere = set(names).intersection(*mixtures)
    free = [name for name in names if name not in everywhere]
    holds = np.array([[name in members for name in free] for members in mixtures], dtype=np.float64)
    shared = holds @ holds.T
    pairs = shared * (shared - 1) / 2
    start = (30 * (typical + widest)) ** 2
    sizes = np.geomspace(0.05 * typical, 3 * max(typical, widest), SIZES)
    return np.array(
        [size**2 * (shared + share**2 * pairs) + start for size in sizes for share in PAIRS]
    )
